"""Refinement: losses that never rise, whatever the coder; the Gauss-Newton products against explicit matrices."""

from itertools import pairwise

import pytest
import torch

from distrecon.autoencoder import Training, ZooSample, gauss_newton
from distrecon.autoencoder.coders import CODERS
from distrecon.autoencoder.goal import Goal
from distrecon.autoencoder.refine import refine
from distrecon.images import load
from distrecon.nets import architecture, outputs
from tests.autoencoder.small import random_models, related_models, tiny

ARCH = architecture("mlp", sizes=(4, 5, 3), activation="tanh")
FISHER = {"model__latent": 4, "model__fisher_models": 8, "model__fisher_queries": 8}


def plain_goal(models=3):
    """All weights as latents, behind a fixed linear map; targets are another model's."""
    draw = torch.Generator().manual_seed(0)
    basis_ZP = torch.randn(12, ARCH.num_parameters, generator=draw, dtype=torch.float64) / 4
    center_BP = random_models(ARCH, models).double()
    queries = torch.randn(20, 4, generator=draw, dtype=torch.float64)
    targets = outputs(ARCH, 3 * random_models(ARCH, models, first_seed=50).double(), queries).softmax(2)
    scale = torch.linspace(0.5, 2, 12).double()
    return Goal(ARCH, lambda z: center_BP + z @ basis_ZP, lambda z, change: z + change, scale, queries, targets)


@pytest.fixture(scope="module", params=CODERS)
def untrained(request):
    """An autoencoder of each kind, and models that it has not seen."""
    arch = architecture("cnn_small")
    zoo = ZooSample(arch, related_models(arch, 48) + 0.3 * random_models(arch, 48), load("digits"))
    autoencoder = Training(tiny(model__kind=request.param, **(FISHER | {"model__latent": 1})), [zoo], 1).autoencoder
    return autoencoder, 2 * random_models(arch, 4, first_seed=700)


def losses(autoencoder, theta_BP, z, count):
    queries = autoencoder.fitted(0, "queries")[:count]
    target = outputs(autoencoder.architectures[0], theta_BP, queries).log_softmax(2)
    found = outputs(autoencoder.architectures[0], autoencoder.decode(z).detach(), queries).log_softmax(2)
    return (target.exp() * (target - found)).sum(2).mean(1)


def test_more_steps_never_raise_the_loss_of_any_model(untrained):
    autoencoder, theta_BP = untrained
    with torch.no_grad():
        found = [
            losses(autoencoder, theta_BP, autoencoder.encode(theta_BP, refine=k), gauss_newton.QUERIES)
            for k in (0, 1, 2, 4)
        ]
    for before_B, after_B in pairwise(found):
        assert (after_B <= before_B * (1 + 1e-4)).all()
    assert found[-1].sum() < 0.9 * found[0].sum()


def test_adam_leaves_models_alone_that_it_would_make_worse(untrained):
    autoencoder, theta_BP = untrained
    queries = autoencoder.fitted(0, "queries")
    targets = outputs(autoencoder.architectures[0], theta_BP, queries).softmax(2)
    with torch.no_grad():
        z = autoencoder.encode(theta_BP)
    before_B = losses(autoencoder, theta_BP, z, len(queries))
    for rate in (0.05, 50.0):
        after = autoencoder.refine(z, targets, 3, refiner="adam", learning_rate=rate)
        assert (losses(autoencoder, theta_BP, after, len(queries)) <= before_B * (1 + 1e-4)).all()


def test_a_direction_that_does_not_help_is_refused(monkeypatch):
    goal, z = plain_goal(), torch.zeros(3, 12).double()
    uphill = refine("gauss_newton", goal, z, 1) - z
    monkeypatch.setattr(gauss_newton._Model, "minimum", lambda self, *_: -uphill * goal.scale)
    assert torch.equal(refine("gauss_newton", goal, z, 2), z)


def test_the_curvature_is_gauss_newtons():
    goal, z = plain_goal(), 0.1 * torch.ones(3, 12).double()
    model = gauss_newton._Model(goal, z, 1 / goal.scale.expand(12))
    direction = torch.randn(3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = model._curvature(direction)
    for b in range(3):

        def logits(u_Z, b=b):
            return ARCH.forward(goal.decode(z + u_Z / goal.scale)[b : b + 1], goal.queries)[0]

        jacobian_QCZ = torch.autograd.functional.jacobian(logits, torch.zeros(12, dtype=torch.float64))
        p_QC = logits(torch.zeros(12).double()).softmax(1)
        metric_QCC = torch.diag_embed(p_QC) - p_QC[:, :, None] * p_QC[:, None, :]
        expected_Z = torch.einsum("qcz,qcd,qdy,y->z", jacobian_QCZ, metric_QCC, jacobian_QCZ, direction[b]) / 20
        torch.testing.assert_close(found[b], expected_Z, rtol=0.01, atol=0.01 * float(expected_Z.abs().max()))


def test_the_minimum_solves_the_damped_system(monkeypatch):
    monkeypatch.setattr(gauss_newton, "ITERATIONS", 40)
    goal, z = plain_goal(1), torch.zeros(1, 12).double()
    model = gauss_newton._Model(goal, z, 1 / goal.scale.expand(12))
    eye = torch.eye(12, dtype=torch.float64)
    curvature_ZZ = torch.cat([model._curvature(e[None]) for e in eye])
    gradient_Z = model._pull((model.p_BQC - goal.targets_BQC) / 20)[0]
    moved_Z = torch.linspace(-1, 1, 12, dtype=torch.float64)
    anchor_B, damping_B = (torch.full((1,), v, dtype=torch.float64) for v in (0.02, 0.01))
    expected_Z = torch.linalg.solve(curvature_ZZ + 0.03 * eye, -gradient_Z - 0.02 * moved_Z)
    found_Z = model.minimum(moved_Z[None], anchor_B, damping_B)[0]
    torch.testing.assert_close(found_Z, expected_Z, rtol=0.03, atol=0.03 * float(expected_Z.abs().max()))


def test_a_few_steps_reach_what_many_adam_steps_do():
    goal, z = plain_goal(), torch.zeros(3, 12).double()
    few, many = (goal.loss(refine(name, goal, z, steps)) for name, steps in (("gauss_newton", 10), ("adam", 600)))
    assert (few <= many + 1e-3).all()
