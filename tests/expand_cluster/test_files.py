"""Networks in safetensors files: what they must hold, and what is said of those that do not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distrecon.errors import UserError
from distrecon.expand_cluster.convolution.files import read_chain
from distrecon.expand_cluster.convolution.hypothesis import read_layers
from distrecon.expand_cluster.weights import read_weights

DENSE = {
    "a1.weight": (3, 2),
    "a1.bias": (3,),
    "a10.weight": (1, 4),
    "a10.bias": (1,),
    "a2.weight": (4, 3),
    "a2.bias": (4,),
}
CONVOLUTION = {"0.weight": (2, 1, 3, 3), "0.bias": (2,), "1.weight": (1, 8), "1.bias": (1,)}


def dense(path: Path) -> object:
    return read_weights(path)


def convolution(path: Path) -> object:
    return read_chain(path, read_layers("conv3 linear", (1, 4, 4)), "relu")


def stored(path: Path, shapes: dict[str, tuple[int, ...]], **kinds: torch.dtype) -> Path:
    save_file({name: torch.ones(shape, dtype=kinds.get(name, torch.float64)) for name, shape in shapes.items()}, path)
    return path


def test_layers_come_in_the_natural_order_of_their_names(tmp_path: Path) -> None:
    weights = read_weights(stored(tmp_path / "net.safetensors", DENSE))
    assert [tuple(w.shape) for w, _ in weights] == [(3, 2), (4, 3), (1, 4)]


@pytest.mark.parametrize(("read", "shapes"), [(dense, DENSE), (convolution, CONVOLUTION)])
def test_what_is_no_such_network_is_refused_in_one_line(tmp_path: Path, read, shapes) -> None:
    path = tmp_path / "net.safetensors"
    read(stored(path, shapes))
    name = next(iter(shapes))
    odd = [
        {**shapes, "more": (1,)},
        {**shapes, "b\x1b[2J.bias": (1,)},
        {key: value for key, value in shapes.items() if not key.endswith("bias")},
        {**shapes, name: ()},
        {**shapes, name: (5, *shapes[name][1:])},
        {**shapes, name.replace("weight", "bias"): (7,)},
        {},
    ]
    for wrong in odd:
        with pytest.raises(UserError) as error:
            read(stored(path, wrong))
        assert str(error.value).isprintable()
        assert "net.safetensors" in str(error.value)
    with pytest.raises(UserError, match="no layer's weights"):
        read(stored(path, shapes, **{name: torch.int64}))
    content = stored(path, shapes).read_bytes()
    for damaged in (b"", b"{}", content[:20], content[: len(content) // 2], b"\xff" * 8 + content[8:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"net\.safetensors is not a safetensors file"):
            read(path)
    path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        read(path)
