"""ResNet-18, 11.7 million parameters: torchvision's own module, and ours under its names."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from distrecon.nets import align, permute, random_permutation
from distrecon.nets.trace import of_module, random_models
from tests.nets.module_networks import ResNet18

OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


def torchvision_resnet18() -> nn.Module:
    """torchvision's compiled operators fit one build of torch only. No classifier calls them, but its import wants the
    names of two: where they do not load, these are declared, and the networks' Python is all that runs."""
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        for name in ("nms", "qnms"):
            OPERATORS.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torchvision
    return torchvision.models.resnet18()


@pytest.mark.slow
@pytest.mark.parametrize("make", [ResNet18, torchvision_resnet18])
def test_resnet18(make: Callable[[], nn.Module]) -> None:
    """Eight blocks have a group inside each, and four stages have one residual stream each."""
    torch.manual_seed(0)
    module, inputs = make().eval(), torch.randn(2, 3, 32, 32)
    arch = of_module(module, inputs)
    assert arch.num_parameters == 11_689_512 + 2 * 4800  # and the running statistics
    assert sorted(group.size for group in arch.groups) == sorted([64, 128, 256, 512] + 2 * [64, 128, 256, 512])
    theta_BP = random_models(arch, 1)
    permuted_BP = permute(arch, theta_BP, random_permutation(arch, torch.Generator().manual_seed(0), 1))
    outputs = arch.forward(theta_BP, inputs.double())
    torch.testing.assert_close(arch.forward(permuted_BP, inputs.double()), outputs, rtol=0, atol=1e-10)
    module.double().load_state_dict(arch.unflatten(theta_BP[0]))
    torch.testing.assert_close(module(inputs.double()), outputs[0], rtol=0, atol=1e-10)
    assert torch.equal(align(arch, permuted_BP, theta_BP[0]), theta_BP)
