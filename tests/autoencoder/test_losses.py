"""Every loss against a slow float64 reference, and its gradient against finite differences."""

import math

import pytest
import torch

from distrecon.autoencoder import losses
from distrecon.nets import architecture
from tests.autoencoder.small import random_models


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_contrastive(views_2GJ, temperature):
    """NT-Xent as Chen et al. (2020) write it, pair by pair."""
    views, size = [v / v.norm() for v in views_2GJ.flatten(0, 1)], views_2GJ.shape[1]
    result = []
    for model in range(size):
        loss = 0.0
        for anchor, other in ((model, model + size), (model + size, model)):
            total = sum(math.exp(views[anchor] @ views[k] / temperature) for k in range(2 * size) if k != anchor)
            loss -= math.log(math.exp(views[anchor] @ views[other] / temperature) / total)
        result.append(loss / 2)
    return torch.tensor(result, dtype=torch.float64)


def test_contrastive_is_nt_xent_over_the_global_batch():
    views_2GJ = draw(2, 5, 3)
    expected_G = slow_contrastive(views_2GJ, 0.3)
    torch.testing.assert_close(losses.contrastive(views_2GJ, views_2GJ, 0, 0.3), expected_G)
    for start, end in ((0, 2), (2, 5), (3, 3)):
        part = losses.contrastive(views_2GJ[:, start:end], views_2GJ, start, 0.3)
        torch.testing.assert_close(part, expected_G[start:end])


def test_contrastive_gradient():
    views_2GJ = draw(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: losses.contrastive(v, v, 0, 0.5), (views_2GJ,))


def slow_behavioral(kind, output_QC, target_QC, temperature):
    total = 0.0
    for output_C, target_C in zip(output_QC, target_QC, strict=True):
        p, q = torch.softmax(target_C, 0), torch.softmax(output_C, 0)
        if kind == "mse_logits":
            total += 0.5 * ((output_C - target_C) ** 2).sum()
        elif kind == "mse_centred":
            total += 0.5 * ((output_C - output_C.mean() - target_C + target_C.mean()) ** 2).sum()
        elif kind == "mse_softmax":
            total += 0.5 * ((q - p) ** 2).sum()
        elif kind == "cross_entropy":
            total += -(p * q.log()).sum()
        else:
            p, q = torch.softmax(target_C / temperature, 0), torch.softmax(output_C / temperature, 0)
            total += temperature**2 * (p * (p / q).log()).sum()
    return total / len(output_QC)


@pytest.mark.parametrize("kind", losses.BEHAVIORAL)
def test_behavioral_values_and_gradients(kind):
    outputs_BQC, targets_BQC = draw(3, 4, 5), draw(3, 4, 5, seed=1)
    expected_B = torch.stack([slow_behavioral(kind, o, t, 2.5) for o, t in zip(outputs_BQC, targets_BQC, strict=True)])
    torch.testing.assert_close(losses.behavioral(kind, outputs_BQC, targets_BQC, 2.5), expected_B)
    outputs_BQC.requires_grad_()
    assert torch.autograd.gradcheck(lambda o: losses.behavioral(kind, o, targets_BQC, 2.5), (outputs_BQC,))


@pytest.mark.parametrize("kind", [k for k in losses.BEHAVIORAL if k not in ("mse_logits", "cross_entropy")])
def test_behavioral_ignores_a_constant_added_to_logits(kind):
    outputs_BQC, targets_BQC = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    shifted_BQC = outputs_BQC + draw(2, 3, 1, seed=2)
    same = losses.behavioral(kind, shifted_BQC, targets_BQC)
    torch.testing.assert_close(same, losses.behavioral(kind, outputs_BQC, targets_BQC))


def test_structural_per_token_by_hand():
    arch = architecture("cnn_small")
    original_BP = random_models(arch, 2).double()
    difference_BP = 0.1 * draw(2, arch.num_parameters)
    expected = []
    for theta_P, delta_P in zip(original_BP, difference_BP, strict=True):
        variances, errors = [], []
        for index_D in arch.token_index_TD:
            own = index_D[index_D < arch.num_parameters]
            variances.append(theta_P[own].var(correction=0))
            errors.append((delta_P[own] ** 2).mean())
        floor = 1e-3 * torch.stack(variances).mean()
        expected.append(torch.stack([e / max(v, floor) for e, v in zip(errors, variances, strict=True)]).mean())
    found_B = losses.structural_per_token(arch, difference_BP, original_BP)
    torch.testing.assert_close(found_B, torch.stack(expected))


def test_structural_and_cycle_are_means_per_model():
    difference_BP = draw(3, 7)
    torch.testing.assert_close(losses.structural(difference_BP)[1], (difference_BP[1] ** 2).sum() / 7)
    z, again = draw(3, 2, 4), draw(3, 2, 4, seed=1)
    torch.testing.assert_close(losses.cycle(z, again)[2], ((z[2] - again[2]) ** 2).sum() / 8)
