"""Coordinates to query in: the input directions that matter, and the scale that excites the activation.

Finite differences of the black box give samples of its input gradient, which lie in the row space of the first layer's
weights. Their singular value decomposition gives that space (and the layer's width, where it is below the input size)
and coordinates in which the gradient is isotropic: probes that are standard normal there excite every first-layer
neuron about equally, and students learn there in a fraction of the steps. Compare Beiser et al. (arXiv 2511.20312).

Legend: Q queries, I inputs, R relevant directions, O outputs, S points at which gradients are taken.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distrecon.expand_cluster.blackbox import BlackBox
from distrecon.expand_cluster.thresholds import (
    BLIND,
    CONDITION,
    GAP,
    LEAST_NOISE,
    NONLINEAR,
    STRAIGHT_MARGIN,
    STRAIGHT_ROUNDING,
)
from distrecon.nets.activations import Activation

GRADIENT_POINTS = 8
ROOM = 0.1  # round the points, for the differences
KINK_STEP = 1e-3  # longer differences straddle a kink too often
SCALES = tuple(2.0**k for k in range(-4, 7))
SCALE_QUERIES = 300
# least and largest scatter of probes round a bend, relative to its distance from the centre: behind a bend in a corner
# of the layer before there is little room
NEAR = (0.003, 0.3)
WIDE_SCALES = (1.0, 4.0, 16.0)  # of the probes that search for directions not found yet


@dataclass(frozen=True)
class Coordinates:
    """z = to_RI x, x = back_IR z + anything outside the relevant directions (`outside_II` projects onto that rest)."""

    to_RI: Tensor
    back_IR: Tensor
    outside_II: Tensor
    scale: float
    error: float  # relative, of the directions; 0 where they are the inputs themselves
    nonlinear: tuple[float, ...] = ()  # the outputs' share that is not linear at each of SCALES, where it was measured

    def rescaled(self, factor: float) -> "Coordinates":
        """The same directions with probes `factor` times as large."""
        to_RI, back_IR = self.to_RI / factor, self.back_IR * factor
        return replace(self, to_RI=to_RI, back_IR=back_IR, scale=self.scale * factor)

    def excited(self, share: float) -> "Coordinates":
        """The same directions at the smallest scale at which the nonlinear share reaches `share` of its largest value.

        Unchanged where the share was not measured.
        """
        if not self.nonlinear:
            return self
        enough = share * max(self.nonlinear)
        scale = next(scale for scale, reached in zip(SCALES, self.nonlinear, strict=True) if reached >= enough)
        return self.rescaled(scale / self.scale)

    @property
    def rank(self) -> int:
        """Number of relevant input directions R."""
        return self.to_RI.shape[0]

    def draw(self, count: int, generator: torch.Generator, scales: tuple[float, ...] = (1.0, 1.0, 3.0)) -> Tensor:
        """Probes x[Q, I]: normal in the relevant coordinates with the scales in turn, normal outside as well."""
        size_Q1 = torch.tensor(scales, dtype=torch.float64).repeat(count // len(scales) + 1)[:count, None]
        z_QR = torch.randn(count, self.rank, generator=generator, dtype=torch.float64)
        x_QI = (z_QR * size_Q1) @ self.back_IR.T
        if self.rank < self.back_IR.shape[0]:
            noise_QI = torch.randn(count, self.back_IR.shape[0], generator=generator, dtype=torch.float64)
            x_QI = x_QI + self.scale * size_Q1 * noise_QI @ self.outside_II
        return x_QI

    def near(self, bends_SI: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Probes x[Q, I] scattered round given inputs, by small and large shares of their distance from 0."""
        chosen_QI = bends_SI[torch.randint(len(bends_SI), (count,), generator=generator)]
        noise_QR = torch.randn(count, self.rank, generator=generator, dtype=torch.float64)
        away_Q1 = (chosen_QI @ self.to_RI.T).norm(dim=1, keepdim=True) / self.rank**0.5
        least, largest = NEAR
        share_Q1 = largest * (least / largest) ** torch.rand(count, 1, generator=generator, dtype=torch.float64)
        return chosen_QI + share_Q1 * away_Q1 * noise_QR @ self.back_IR.T


def find_coordinates(
    box: BlackBox,
    activation: Activation | None,
    subspace: bool,
    generator: torch.Generator,
    also_SI: Tensor | None = None,
) -> Coordinates:
    """Coordinates from the black box's gradients, or the inputs themselves, with probes scaled to excite it.

    The inputs themselves, taken to be standardised, if not `subspace` or if all directions matter. Gradients are taken
    at standard normal points and at some of `also_SI`.

    `activation` None: unknown.
    """
    if not subspace:
        return _inputs_themselves(box.inputs)
    points_SI = torch.randn(GRADIENT_POINTS, box.inputs, generator=generator, dtype=torch.float64)
    if also_SI is not None:
        points_SI = torch.cat([points_SI, also_SI[:: max(1, len(also_SI) // (2 * GRADIENT_POINTS))]])
    gradients_GI = torch.empty(0, box.inputs, dtype=torch.float64)
    before = 0
    while len(points_SI):
        more_GI = input_gradients(box, activation, points_SI)
        if not len(more_GI):  # kinks everywhere, whatever the activation is said to be, or answers rounded to one
            return _inputs_themselves(box.inputs)
        gradients_GI = torch.cat([gradients_GI, more_GI])
        rank = numerical_rank(gradients_GI)
        if rank in (0, box.inputs):  # nothing to reduce, and stretching weak directions then only hurts
            return _inputs_themselves(box.inputs)
        if len(gradients_GI) < 2 * rank + 10:
            points_SI = torch.randn(GRADIENT_POINTS, box.inputs, generator=generator, dtype=torch.float64)
            continue
        _, values, right_RI = torch.linalg.svd(gradients_GI, full_matrices=False)
        error = float(values[rank] / values[0]) if rank < min(gradients_GI.shape) else 0.0
        basis_RI = right_RI[:rank]
        strength_R = (gradients_GI @ basis_RI.T).square().mean(0).sqrt()
        strength_R = strength_R.clamp(min=CONDITION * float(strength_R.max()))
        found = _scaled(box, basis_RI, strength_R, error, generator)
        points_SI = _blind_points(box, found, generator) if rank > before else points_SI[:0]
        before = rank
    return found


def _blind_points(box: BlackBox, coordinates: Coordinates, generator: torch.Generator) -> Tensor:
    """A few probes whose answers change as they move outside the relevant directions, which are then not all found.

    A neuron that is off, or saturated, wherever the gradients were taken does not show in them.
    """
    x_QI = coordinates.draw(SCALE_QUERIES, generator, WIDE_SCALES)
    size_Q1 = (x_QI @ coordinates.to_RI.T).norm(dim=1, keepdim=True) / coordinates.rank**0.5
    noise_QI = torch.randn(x_QI.shape, generator=generator, dtype=torch.float64)
    moved_QI = x_QI + coordinates.scale * size_Q1 * noise_QI @ coordinates.outside_II
    x_QI, moved_QI = box.place(x_QI), box.place(moved_QI)
    here_QO, there_QO = box(x_QI), box(moved_QI)
    change_Q = (there_QO - here_QO).abs().amax(1) / here_QO.std()
    seen_Q = change_Q > max(BLIND, GAP * coordinates.error, GAP * box.noise / float(here_QO.std()))
    return torch.cat([x_QI[seen_Q], moved_QI[seen_Q]])[: 2 * GRADIENT_POINTS]


def input_gradients(box: BlackBox, activation: Activation | None, x_SI: Tensor) -> Tensor:
    """d outputs / d inputs at the points x[S, I], [<= S * O, I], by central differences.

    Five-point differences where the activation is smooth. Where it has kinks, two-point ones, and a point with a kink
    between its differences (its second difference is not zero) is left out, as is one next to where scores end. Unknown
    activations count as kinked.
    """
    x_SI = box.place(x_SI, ROOM)
    x_SI = x_SI[box(x_SI).isfinite().all(1)]
    center_SO = box(x_SI)
    spread = float(center_SO.std()) if len(center_SO) else 0.0
    if spread == 0:  # all answers of these points are rounded to one
        return torch.empty(0, box.inputs, dtype=torch.float64)
    noise = max(box.noise / spread, LEAST_NOISE)
    kinked = activation is None or activation.symmetry == "scaled"
    step = min(noise**0.25, KINK_STEP) if kinked else noise**0.2

    def shifted(multiple: int) -> Tensor:
        moves_II = multiple * step * torch.eye(box.inputs, dtype=torch.float64)
        return box((x_SI[:, None] + moves_II).flatten(0, 1)).reshape(len(x_SI), box.inputs, -1)

    up, down = shifted(1), shifted(-1)
    if kinked:
        bend_S = (up + down - 2 * center_SO[:, None]).abs().amax(dim=(1, 2))
        slopes = (up - down) / (2 * step)
        told_S = slopes.isfinite().all(2).all(1) & (bend_S <= STRAIGHT_MARGIN * box.noise + STRAIGHT_ROUNDING * spread)
    else:
        slopes = (8 * (up - down) - (shifted(2) - shifted(-2))) / (12 * step)
        told_S = slopes.isfinite().all(2).all(1)
    return slopes[told_S].transpose(1, 2).flatten(0, 1)


def numerical_rank(gradients_GI: Tensor) -> int:
    """Number of singular values before the widest gap of at least GAP; all of them when there is no such gap."""
    if not len(gradients_GI):
        return 0
    values = torch.linalg.svdvals(gradients_GI)
    values = values.clamp(min=1e-16 * float(values[0]))
    ratios = values[:-1] / values[1:]
    if len(ratios) and ratios.max() >= GAP:
        return int(ratios.argmax()) + 1
    return len(values)


def _inputs_themselves(inputs: int) -> Coordinates:
    eye_II = torch.eye(inputs, dtype=torch.float64)
    return Coordinates(eye_II, eye_II, torch.zeros_like(eye_II), 1.0, 0.0)


def isotropic(box: BlackBox, generator: torch.Generator) -> Coordinates:
    """The inputs themselves, all on the scale that shows the nonlinearity."""
    eye_II = torch.eye(box.inputs, dtype=torch.float64)
    return _scaled(box, eye_II, torch.ones(box.inputs, dtype=torch.float64), 0.0, generator)


def _scaled(
    box: BlackBox, basis_RI: Tensor, strength_R: Tensor, error: float, generator: torch.Generator
) -> Coordinates:
    """Coordinates along the rows of basis[R, I], stretched by the strengths, as large as shows the nonlinearity."""
    rank, inputs = basis_RI.shape
    back_IR = basis_RI.T / strength_R
    back_IR = back_IR * (rank**0.5 / back_IR.norm())
    z_QR = torch.randn(max(SCALE_QUERIES, 4 * rank), rank, generator=generator, dtype=torch.float64)
    shares = tuple(_nonlinear_share(box, z_QR, scale * back_IR) for scale in SCALES)
    outside_II = torch.eye(inputs, dtype=torch.float64) - basis_RI.T @ basis_RI
    return Coordinates(torch.linalg.pinv(back_IR), back_IR, outside_II, 1.0, error, shares).excited(NONLINEAR)


def _nonlinear_share(box: BlackBox, z_QR: Tensor, back_IR: Tensor) -> float:
    x_QI = box.place(z_QR @ back_IR.T)
    y_QO, z_QR = box(x_QI), x_QI @ torch.linalg.pinv(back_IR).T
    design = torch.cat([z_QR, z_QR.new_ones(len(z_QR), 1)], dim=1)
    rest = y_QO - design @ torch.linalg.lstsq(design, y_QO).solution
    return float(rest.square().sum() / (y_QO - y_QO.mean(0)).square().sum().clamp(min=1e-300))
