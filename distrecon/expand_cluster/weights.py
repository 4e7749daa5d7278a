"""Weights of a dense network, [(W[out, in], b[out]), ...]: evaluated, read, written, taken from and put into theta.

Legend: N networks, P parameters, Q queries, I inputs, R relevant input directions, O outputs.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distrecon.errors import UserError, printable, said
from distrecon.expand_cluster.networks import DenseNet
from distrecon.nets.activations import activation as find_activation

Weights = list[tuple[Tensor, Tensor]]


def layer_sizes(weights: Weights) -> list[int]:
    """Inputs, hidden layers, outputs."""
    return [weights[0][0].shape[1], *(len(b) for _, b in weights)]


def network(weights: Weights, activation: str) -> Callable[[Tensor], Tensor]:
    """The function [Q, I] -> [Q, O] of dense layers [(W[out, in], b[out]), ...], in the weights' precision."""
    act = find_activation(activation)

    def forward(x_QI: Tensor) -> Tensor:
        h = x_QI.to(weights[0][0].dtype)
        for i, (w, b) in enumerate(weights):
            h = torch.addmm(b, h, w.T)
            h = act(h) if i < len(weights) - 1 else h
        return h

    return forward


def from_theta(net: DenseNet, theta_P: Tensor, mean_O: Tensor, scale: float, to_RI: Tensor | None = None) -> Weights:
    """Weights of a network without skip whose answers were standardised by `mean_O` and `scale`.

    Its inputs are to_RI x, where to_RI is given.
    """
    layers = [(m[0, :, :-1], m[0, :, -1]) for m in net.matrices(theta_P[None])]
    if to_RI is not None:
        layers[0] = (layers[0][0] @ to_RI, layers[0][1])
    last_w, last_b = layers[-1]
    layers[-1] = (last_w * scale, last_b * scale + mean_O)
    return [(w.clone(), b.clone()) for w, b in layers]


def to_theta(weights: Weights, mean_O: Tensor, scale: float) -> Tensor:
    """theta[1, P] for standardised answers: the inverse of `from_theta` without coordinates."""
    last_w, last_b = weights[-1]
    layers = [*weights[:-1], (last_w / scale, (last_b - mean_O) / scale)]
    return DenseNet.flatten([torch.cat([w, b[:, None]], dim=1)[None] for w, b in layers])


def write_weights(path: Path, weights: Weights, metadata: dict[str, str]) -> None:
    """layer<i>.weight, layer<i>.bias as safetensors. Raises UserError where the file exists."""
    if path.exists():
        raise UserError(f"{path} exists already; recovered networks are never overwritten")
    tensors = {}
    for i, (w, b) in enumerate(weights):
        tensors[f"layer{i}.weight"], tensors[f"layer{i}.bias"] = w.contiguous(), b.contiguous()
    save_file(tensors, path, metadata)


def read_weights(path: Path) -> Weights:
    """[(W, b), ...] of dense layers from NAME.weight and NAME.bias, in the natural order of the names.

    Raises UserError when the file is missing, is no safetensors file, or holds anything but a chain of dense layers.
    """
    weights: Weights = []
    for name, w, b in read_pairs(path):
        if w.ndim != 2 or b.shape != w.shape[:1]:
            raise UserError(f"{path}: {name} {list(w.shape)} is not a dense layer with a bias")
        if weights and weights[-1][0].shape[0] != w.shape[1]:
            raise UserError(f"{path}: {name} does not take the outputs of the layer before it")
        weights.append((w, b))
    if len(weights) < 2:
        raise UserError(f"{path}: not a chain of at least two dense layers NAME.weight, NAME.bias")
    return weights


def read_pairs(path: Path) -> list[tuple[str, Tensor, Tensor]]:
    """(NAME.weight, weight, bias) of each layer in a safetensors file, in the natural order of the names.

    Raises UserError when the file is missing, is no safetensors file, or holds anything but such pairs.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file: {said(error)}") from None
    names = sorted((name for name in tensors if name.endswith(".weight")), key=natural)
    biases = [name.removesuffix("weight") + "bias" for name in names]
    if odd := sorted({*names, *biases} ^ tensors.keys()):
        raise UserError(f"{path}: not layers NAME.weight, NAME.bias alone ({printable(odd[0])})")
    layers = [(name, tensors[name], tensors[bias]) for name, bias in zip(names, biases, strict=True)]
    for name, w, b in layers:
        if w.ndim < 2 or b.ndim != 1 or not (w.is_floating_point() and b.is_floating_point()):
            raise UserError(f"{path}: {printable(name)} is {w.dtype} {list(w.shape)}: no layer's weights")
    return layers


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer10 after layer9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
