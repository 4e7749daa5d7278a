"""Flow matching against closed forms and hand-worked values."""

import pytest
import torch

from distrecon.autoencoder import flow, samplers


def test_a_path_by_hand():
    start, end = torch.tensor([[0.0, 4.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [5.0, -1.0]])
    place, velocity = flow.path(start, end, torch.tensor([0.25, 0.5]))
    torch.testing.assert_close(place, torch.tensor([[0.5, 3.0], [3.0, 0.0]]))
    torch.testing.assert_close(velocity, torch.tensor([[2.0, -4.0], [4.0, -2.0]]))


def test_the_exact_field_of_a_normal_distribution_carries_noise_to_it():
    """For latents N(m, s^2) the field is s'/s_t (x - t m) + m, s_t^2 = (1 - t)^2 + t^2 s^2, which ends at m + s x_0."""
    mean, deviation = torch.tensor([3.0, -1.0], dtype=torch.float64), 0.5

    def field(x_BK, t_B, condition_B):
        t = t_B[:, None]
        variance = (1 - t) ** 2 + (t * deviation) ** 2
        growth = (t * deviation**2 - (1 - t)) / variance
        return growth * (x_BK - t * mean) + mean

    start = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = [flow.carried(field, start, start.new_zeros(50), steps) for steps in (20, 40)]
    errors = [(end - (mean + deviation * start)).abs().max() for end in ends]
    assert errors[1] < 2e-3
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)  # Heun's method is of second order


def test_steps_of_the_integration_by_hand():
    """dx/dt = t, and dx/dt = x in one step of Heun's method: 1 + 1 + 1/2."""
    x = torch.ones(1, 1)
    slope = flow.carried(lambda x_BK, t_B, c_B: t_B[:, None].expand_as(x_BK), x, torch.zeros(1), 7)
    torch.testing.assert_close(slope, torch.tensor([[1.5]]))
    torch.testing.assert_close(flow.carried(lambda x_BK, t_B, c_B: x_BK, x, torch.zeros(1), 1), torch.tensor([[2.5]]))


def test_the_span_of_latents_loses_nothing_and_has_unit_variance():
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(20, 3, generator=draw, dtype=torch.float64) @ torch.randn(3, 50, generator=draw).double() + 7
    span = flow.Span.of(z)
    x = span.coordinates(z)
    assert x.shape == (20, 3)
    torch.testing.assert_close(span.latents(x), z)
    assert float(x.square().mean()) == pytest.approx(1)
    torch.testing.assert_close((x[0] - x[1]).norm() * span.scale, (z[0] - z[1]).norm())
    same = flow.Span.of(z[:1].expand(4, -1))
    torch.testing.assert_close(same.latents(same.coordinates(z[:1])), z[:1])


def test_samples_follow_their_condition(monkeypatch):
    """Bad models lie round (-4, 0, ...), good ones round (4, 0, ...): the flow draws at the accuracy asked for."""
    monkeypatch.setattr(flow, "STEPS", 150)
    draw = torch.Generator().manual_seed(0)
    accuracy_N = torch.tensor([0.2, 0.8]).repeat(40)
    centre = torch.tensor([4.0, 0, 0])
    z = torch.where(accuracy_N[:, None] > 0.5, centre, -centre) + 0.3 * torch.randn(80, 3, generator=draw)
    wanted_M = torch.tensor([0.8] * 50 + [0.2] * 50)
    drawn = flow.flow_matching(z, accuracy_N, wanted_M, 1.0, torch.Generator().manual_seed(1))
    assert (drawn[:50, 0] > 0).float().mean() > 0.95
    assert (drawn[50:, 0] < 0).float().mean() > 0.95
    assert float(drawn[:50, 1:].std()) == pytest.approx(0.3, rel=0.4)
    good = accuracy_N.argsort(descending=True, stable=True)[:10]
    known = samplers.Known(z, accuracy_N, good)
    sampled = samplers.sample("flow_matching", z[good], 20, 1.0, seed=3, known=known)
    assert (sampled[:, 0] > 0).float().mean() > 0.9
    assert torch.equal(sampled, samplers.sample("flow_matching", z[good], 20, 1.0, seed=3, known=known))
    assert not torch.equal(sampled, samplers.sample("flow_matching", z[good], 20, 1.0, seed=4, known=known))
    unknown = samplers.sample("flow_matching", z[good].view(10, 1, 3), 20, 1.0)
    assert unknown.shape == (20, 1, 3)
    assert (unknown[:, 0, 0] > 0).all()
