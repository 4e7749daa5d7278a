"""State dicts are recognised by their shapes, whatever their names and order."""

import pytest
import torch

from distrecon.errors import UserError
from distrecon.nets import architecture
from distrecon.nets.known import mlp
from distrecon.nets.recognise import flatten_as, recognise

CASES = {
    "cnn_small": {},
    "cnn3": {"in_channels": 3},
    "lenet5": {"in_channels": 1, "image_size": 28},
    "zoo_cnn": {"in_channels": 3, "num_classes": 7},
    "zoo_cnn2": {},
    "mlp": {"sizes": (6, 5, 5, 3)},
}


@pytest.mark.parametrize("name", CASES)
def test_every_architecture_is_recognised_under_its_own_names(name: str) -> None:
    arch = architecture(name, activation="gelu", **CASES[name])
    theta_P = torch.arange(float(arch.num_parameters))
    state = arch.unflatten(theta_P)
    assert recognise(state, "gelu") == arch
    assert recognise(state, "gelu", name) == arch
    shuffled = dict(sorted(state.items(), reverse=True))
    assert torch.equal(flatten_as(recognise(shuffled, "gelu"), shuffled), theta_P)


def test_other_names_become_the_architectures() -> None:
    arch = architecture("cnn3")
    theta_P = torch.arange(float(arch.num_parameters))
    renamed = {
        f"m.{10 * (i // 2)}.{k.rpartition('.')[2]}": v for i, (k, v) in enumerate(arch.unflatten(theta_P).items())
    }
    found = recognise(renamed)
    assert [layer.name for layer in found.layers] == ["m.0", "m.10", "m.20", "m.30", "m.40"]
    assert torch.equal(flatten_as(found, renamed), theta_P)
    assert torch.equal(flatten_as(arch, renamed), theta_P)  # dropout shifted the numbers
    assert torch.equal(torch.cat([v.flatten() for v in found.unflatten(theta_P).values()]), theta_P)


STATE = mlp((4, 3, 2)).unflatten(torch.zeros(23))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "is empty"),
        ({k: v for k, v in STATE.items() if k != "layers.1.bias"}, "'layers.1.bias' is missing"),
        ({**STATE, "bn.running_mean": torch.zeros(3)}, "'bn.running_mean' is not a weight or bias"),
        ({"a.weight": torch.zeros(3, 2, 9, 9), "a.bias": torch.zeros(3)}, "no known architecture"),
    ],
)
def test_what_is_not_known_is_said(state, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recognise(state)


def test_a_named_architecture_excludes_the_others() -> None:
    with pytest.raises(UserError, match="no known architecture called 'cnn3'"):
        recognise(architecture("lenet5").unflatten(torch.zeros(62006)), name="cnn3")
    with pytest.raises(UserError, match=r"'layers\.0\.weight' has shape"):
        flatten_as(mlp((5, 3, 2)), STATE)
