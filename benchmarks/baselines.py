"""What the suite compares with: the published way, implemented straightforwardly and as fast as its design allows.

Each keeps the structure that sets its cost (a vmap over per-model calls, a Python loop over models, a cut of the tree
at every height) and has no needless work beside it.

Legend: B models, P parameters, Q queries, C classes, T tokens, D token size, J projection size.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distrecon.nets import Architecture

Clock = Callable[[], float]
ACTIVATION_MODULES = {"relu": nn.ReLU, "tanh": nn.Tanh}


def module(arch: Architecture) -> nn.Sequential:
    """The architecture as torch modules."""
    parts: list[nn.Module] = []
    for i, layer in enumerate(arch.layers):
        if layer.kernel:
            parts.append(nn.Conv2d(layer.in_features, layer.out_features, layer.kernel, padding=layer.padding))
            if layer.pool > 1:
                parts.append(nn.MaxPool2d(layer.pool))
        else:
            if i and arch.layers[i - 1].kernel:
                parts.append(nn.Flatten())
            parts.append(nn.Linear(layer.in_features, layer.out_features))
        if i + 1 < len(arch.layers):
            parts.append(ACTIVATION_MODULES[arch.activation]())
    return nn.Sequential(*parts)


def state_dicts(arch: Architecture, theta_BP: Tensor) -> list[dict[str, Tensor]]:
    """Every model as a state dict of `module(arch)`: how checkpoints lie."""
    names = list(module(arch).state_dict())
    return [dict(zip(names, arch.unflatten(theta_P).values(), strict=True)) for theta_P in theta_BP]


# -- behavioural loss --------------------------------------------------------------------------------------------------


def vmapped_outputs(arch: Architecture, net: nn.Module, theta_BP: Tensor, inputs: Tensor) -> Tensor:
    """logits[B, Q, C] by torch.func.vmap over functional calls of one model."""
    names = list(net.state_dict())
    values = [value for pair in arch.weights_and_biases(theta_BP) for value in pair]
    stacked = dict(zip(names, values, strict=True))
    return torch.func.vmap(lambda state: torch.func.functional_call(net, state, (inputs,)))(stacked)


def behavioural_loss(
    arch: Architecture, net: nn.Module, reconstructed_BP: Tensor, theta_BP: Tensor, inputs: Tensor
) -> Tensor:
    """Squared error of softmax outputs; the originals are evaluated again at every step, as published."""
    with torch.no_grad():
        targets_BQC = vmapped_outputs(arch, net, theta_BP, inputs).softmax(2)
    outputs_BQC = vmapped_outputs(arch, net, reconstructed_BP, inputs).softmax(2)
    return (outputs_BQC - targets_BQC).square().mean()


# -- symmetries and tokens, one checkpoint at a time -------------------------------------------------------------------


def permuted(arch: Architecture, state: Mapping[str, Tensor], order: list[Tensor]) -> dict[str, Tensor]:
    """A copy of a state dict with its hidden units in another order."""
    values, found = list(state.values()), {}
    names = list(state)
    for i, layer in enumerate(arch.layers):
        weight, bias = values[2 * i], values[2 * i + 1]
        if i:
            grouped = weight.unflatten(1, (-1, layer.positions)) if not layer.kernel else weight
            weight = grouped[:, order[i - 1]].reshape(weight.shape)
        if i + 1 < len(arch.layers):
            weight, bias = weight[order[i]], bias[order[i]]
        found[names[2 * i]], found[names[2 * i + 1]] = weight.clone(), bias.clone()
    return found


def tokens_of(arch: Architecture, state: Mapping[str, Tensor]) -> Tensor:
    """tokens[T, D] of one state dict: each layer's rows with their biases, zero padded."""
    values = list(state.values())
    rows = [
        F.pad(torch.cat([w.flatten(1), b[:, None]], 1), (0, arch.token_size - layer.fan_in - 1))
        for layer, w, b in zip(arch.layers, values[::2], values[1::2], strict=True)
    ]
    return torch.cat(rows)


def state_of(arch: Architecture, names: list[str], tokens_TD: Tensor) -> dict[str, Tensor]:
    """The inverse of `tokens_of`."""
    found, row = {}, 0
    for i, layer in enumerate(arch.layers):
        part = tokens_TD[row : row + layer.out_features]
        found[names[2 * i]] = part[:, : layer.fan_in].reshape(layer.weight_shape)
        found[names[2 * i + 1]] = part[:, layer.fan_in]
        row += layer.out_features
    return found


def contrastive(first_BJ: Tensor, second_BJ: Tensor, temperature: float) -> Tensor:
    """NT-Xent by cosine similarity of all pairs [2B, 2B, J] and boolean masks, as in common implementations."""
    both = torch.cat([first_BJ, second_BJ])
    count = len(first_BJ)
    similarity = F.cosine_similarity(both[:, None], both[None], dim=2) / temperature
    itself = torch.eye(2 * count, dtype=torch.bool, device=both.device)
    positives = similarity[itself.roll(count, 0)].view(2 * count, 1)
    negatives = similarity[~itself & ~itself.roll(count, 0)].view(2 * count, -1)
    labels = torch.zeros(2 * count, dtype=torch.long, device=both.device)
    return F.cross_entropy(torch.cat([positives, negatives], 1), labels)


# -- training and evaluation, one model at a time ----------------------------------------------------------------------


def train_one(
    arch: Architecture,
    theta_P: Tensor,
    inputs: Tensor,
    labels_Q: Tensor,
    lr: float,
    epochs: int = 1,
    weight_decay: float = 0.0,
) -> Tensor:
    """One model's trained weights [P]: torch modules, torch.optim.Adam, batches of 32 from memory, without a loader."""
    net = module(arch).to(theta_P.device)
    net.load_state_dict(state_dicts(arch, theta_P[None])[0])
    adam, order = torch.optim.Adam(net.parameters(), lr, weight_decay=weight_decay), torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs), generator=order).split(32):
            adam.zero_grad(set_to_none=True)
            F.cross_entropy(net(inputs[batch]), labels_Q[batch]).backward()
            adam.step()
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


@torch.no_grad()
def evaluate_loop(
    arch: Architecture, states: list[dict[str, Tensor]], inputs: Tensor, labels_Q: Tensor, batch_size: int | None
) -> list[tuple[float, float]]:
    """(accuracy, loss) of each model: load its state dict, run the test set (`batch_size` None: in one batch)."""
    net = module(arch).to(inputs.device)
    data: object = [(inputs, labels_Q)]
    if batch_size is not None:
        data = DataLoader(TensorDataset(inputs, labels_Q), batch_size=batch_size)
    scores = []
    for state in states:
        net.load_state_dict(state)
        right, loss = 0, 0.0
        for x, y in data:  # type: ignore[attr-defined]
            logits = net(x)
            right += int((logits.argmax(1) == y).sum())
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
        scores.append((right / len(inputs), loss / len(inputs)))
    return scores


# -- clustering --------------------------------------------------------------------------------------------------------


def cut_at_every_height(merges: np.ndarray, need: int, seconds: float, clock: Clock) -> tuple[int, int]:
    """Re-cuts the tree at each merge height and counts clusters of at least `need` members.

    Stops after `seconds`; returns how many heights were cut and the largest count.
    """
    start, most = clock(), 0
    for done, height in enumerate(merges[:, 2]):
        labels = fcluster(merges, height, criterion="distance")
        most = max(most, int((np.bincount(labels) >= need).sum()))
        if clock() - start > seconds:
            return done + 1, most
    return len(merges), most


def whole_clustering(vectors_VK: Tensor, need: int, seconds: float, clock: Clock) -> tuple[float, float]:
    """Seconds of scipy's distances and tree, and of the search for the cut (scaled, if it stopped after `seconds`)."""
    start = clock()
    merges = linkage(pdist(vectors_VK.numpy()), method="average")
    tree = clock() - start
    done, _ = cut_at_every_height(merges, need, seconds, clock)
    return tree, (clock() - start - tree) * len(merges) / done
