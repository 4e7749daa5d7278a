"""The networks of a folder as callers get them, who know numpy only."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distrecon.kinds.autoencoder import KIND
from distrecon.nets import architecture, initialise

ARCH = architecture("mlp", sizes=(4, 3, 2), activation="tanh")


@pytest.mark.parametrize("count", [1, 3])
def test_generated_networks_are_served_by_number(tmp_path: Path, count: int) -> None:
    theta_BP = initialise(ARCH, ["normal"] * count, list(range(count)))
    for number, theta_P in enumerate(theta_BP):
        tensors = {name: tensor.contiguous() for name, tensor in ARCH.unflatten(theta_P).items()}
        save_file(tensors, tmp_path / f"{number:05d}.safetensors", {"description": json.dumps(ARCH.to_dict())})
    served = KIND.serve(tmp_path)
    assert served.example.shape == (1, 4)
    x_QI = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for number in range(count):
        expected = ARCH.forward(theta_BP[number : number + 1], x_QI)[0]
        np.testing.assert_allclose(served.call(x_QI.numpy(), number=number), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(served.call(x_QI.numpy()), served.call(x_QI.numpy(), number=0))


def test_a_folder_without_networks_serves_nothing(tmp_path: Path) -> None:
    assert KIND.serve(tmp_path) is None
