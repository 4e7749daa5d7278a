"""Every bend of a piecewise linear function on a line, however near together and however far out.

A point inside every interval of a line tells whether it is straight. One that is not is split until the straight pieces
on both sides of it meet inside it, and answers close to the meeting point lie on them. Takes about nine queries a bend,
and finds it to rounding. Compare Carlini, Jagielski, Mironov (arXiv 2003.04884), who search one bend at a time.

Legend: L lines, T points at first, G intervals (of all lines, each kept with the point where it begins), S bends,
R input directions, O outputs, Q queries.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distrecon.expand_cluster.thresholds import BEND_MARGIN, CLEAR

ROUNDS = 120  # of splitting, at most
OPEN = 2000  # intervals of a line that are still to be split, at most: the function bends everywhere
TINY = 1e-13  # of its distance from the line's start: intervals shorter than this are not split
EDGE = 0.02  # likewise where one end has no answer
BESIDE = 0.01  # of the room on both sides of a meeting point: where answers confirm it
JITTER = 0.17  # of an interval: how far inner points scatter round its middle, so that no symmetry deceives
FRESH, STRAIGHT, BENT, BEND, LOST, APART = range(6)  # intervals: to be asked; ...; between two lines

_Inner = tuple[Tensor, Tensor, Tensor]  # t, y and noise of one point inside every interval
Answer = Callable[[Tensor], tuple[Tensor, Tensor]]  # z[Q, R] -> y[Q, O], its rounding noise [Q, O]; NaN: no answer


class BendsEverywhere(Exception):
    """The function is not piecewise linear, or has thousands of pieces on a line."""


@dataclass(frozen=True)
class Bends:
    """Bends on lines z = start + t direction: t, the slope's jump, and the room to the nearer end of their pieces.

    `z_QR`, `y_QO`, `noise_QO` are all answers on the lines.
    """

    start_LR: Tensor
    direction_LR: Tensor
    line_S: Tensor
    t_S: Tensor
    jump_SO: Tensor
    room_S: Tensor
    z_QR: Tensor
    y_QO: Tensor
    noise_QO: Tensor

    @property
    def points_SR(self) -> Tensor:
        return self.start_LR[self.line_S] + self.t_S[:, None] * self.direction_LR[self.line_S]


@dataclass(frozen=True)
class _Points:
    """Points on lines in order, with the state of the interval that begins at each."""

    line_G: Tensor
    t_G: Tensor
    y_GO: Tensor
    noise_GO: Tensor
    state_G: Tensor

    @property
    def width_G(self) -> Tensor:
        return torch.cat([self.t_G[1:] - self.t_G[:-1], self.t_G[:1] * 0])

    def pieces(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of every interval's straight piece: slope between its ends [G, O], the slope's rounding, and the ends [G]."""
        straight_G = self.state_G == STRAIGHT
        begins_G = ~straight_G
        begins_G[0] = True
        begins_G[1:] |= straight_G[1:] != straight_G[:-1]
        piece_G = begins_G.cumsum(0) - 1
        first = begins_G.nonzero()[:, 0]
        last = torch.cat([first[1:], first.new_tensor([len(self.t_G) - 1])])
        length = (self.t_G[last] - self.t_G[first])[:, None]
        slope, slack = (
            (self.y_GO[last] - self.y_GO[first]) / length,
            (self.noise_GO[last] + self.noise_GO[first]) / length,
        )
        return slope[piece_G], slack[piece_G], self.t_G[first][piece_G], self.t_G[last][piece_G]

    def meeting(self, at_S: Tensor, before_SO: Tensor, after_SO: Tensor) -> Tensor:
        """From the beginning of intervals to where the pieces before and after them meet, by least squares, [S]."""
        jump_SO = (before_SO - after_SO) / self.noise_GO[at_S]
        rise_SO = self.y_GO[at_S + 1] - self.y_GO[at_S] - after_SO * self.width_G[at_S, None]
        return (rise_SO / self.noise_GO[at_S] * jump_SO).sum(1) / jump_SO.square().sum(1)


def scan(answer: Answer, start_LR: Tensor, direction_LR: Tensor, grid_LT: Tensor, generator: torch.Generator) -> Bends:
    """Bends on lines (unit directions) between the first and the last of some ascending t[L, T] on each.

    Raises BendsEverywhere where splitting the intervals makes ever more of them.
    """

    def ask(line_G: Tensor, t_G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return t_G, *answer(start_LR[line_G] + t_G[:, None] * direction_LR[line_G])

    lines, count = grid_LT.shape
    line_G = torch.arange(lines).repeat_interleave(count)
    state_G = torch.full((lines, count), FRESH)
    state_G[:, -1] = APART
    points = _Points(line_G, *ask(line_G, grid_LT.flatten()), state_G.flatten())
    inner = (points.t_G.clone(), points.y_GO.clone(), points.noise_GO.clone())  # of the point inside every interval
    for _ in range(ROUNDS):
        state_G, width_G = points.state_G, points.width_G
        _give_up(points)
        fresh, bent = (state_G == FRESH).nonzero()[:, 0], (state_G == BENT).nonzero()[:, 0]
        bent = bent[(state_G[bent - 1] != FRESH) & (state_G[bent + 1] != FRESH)]  # the others wait for their neighbours
        if not len(fresh) and not len(bent):
            break
        if len(fresh) + len(bent) > OPEN * lines:
            raise BendsEverywhere
        slope_GO, slack_GO, _, _ = points.pieces()
        before_SO, after_SO = slope_GO[bent - 1], slope_GO[bent + 1]
        slack_SO = slack_GO[bent - 1] + slack_GO[bent + 1]
        meet_S = points.meeting(bent, before_SO, after_SO)
        meets_S = (state_G[bent - 1] == STRAIGHT) & (state_G[bent + 1] == STRAIGHT)
        meets_S &= (meet_S > 0) & (meet_S < width_G[bent])
        meets_S &= (slack_SO <= CLEAR * (before_SO - after_SO).abs().amax(1, keepdim=True)).all(1)
        split, bent, meet_S = bent[~meets_S], bent[meets_S], meet_S[meets_S]
        beside_S = BESIDE * torch.minimum(meet_S, width_G[bent] - meet_S)
        share_G = 0.5 + JITTER * (torch.rand(len(fresh), generator=generator, dtype=torch.float64) - 0.5)
        places = (
            points.t_G[fresh] + share_G * width_G[fresh],
            *(points.t_G[bent] + meet_S + s * beside_S for s in (-1, 1)),
        )
        asked = ask(points.line_G[torch.cat([fresh, bent, bent])], torch.cat(places))
        sizes = [len(fresh), len(bent), len(bent)]
        at_fresh, left, right = zip(*(part.split(sizes) for part in asked), strict=True)
        for old, new in zip(inner, at_fresh, strict=True):
            old[fresh] = new
        chord_SO = points.y_GO[fresh] + share_G[:, None] * (points.y_GO[fresh + 1] - points.y_GO[fresh])
        noise_SO = torch.maximum(torch.maximum(points.noise_GO[fresh], points.noise_GO[fresh + 1]), at_fresh[2])
        straight_S = ((at_fresh[1] - chord_SO).abs() <= BEND_MARGIN * noise_SO).all(1)
        state_G[fresh] = torch.where(straight_S, STRAIGHT, BENT)
        # bends closer together than their meeting point shows would put one of these two answers off its piece
        before_SO, after_SO, slack_SO = before_SO[meets_S], after_SO[meets_S], slack_SO[meets_S]
        off_left = left[1] - points.y_GO[bent] - before_SO * (meet_S - beside_S)[:, None]
        off_right = right[1] - points.y_GO[bent + 1] + after_SO * (width_G[bent] - meet_S - beside_S)[:, None]
        noise_SO = left[2] + right[2] + points.noise_GO[bent] + points.noise_GO[bent + 1]
        allowed_SO = BEND_MARGIN * (noise_SO + slack_SO * width_G[bent, None])
        one_S = (torch.maximum(off_left.abs(), off_right.abs()) <= allowed_SO).all(1)
        state_G[bent[one_S]] = BEND
        points, inner = _split(points, inner, torch.cat([split, bent[~one_S]]))
    return _bends(points, start_LR, direction_LR)


def _give_up(points: _Points) -> None:
    """Intervals too short to split, and those without answers at one end (when short) or both, are lost."""
    known_G = torch.isfinite(points.y_GO).all(1)
    next_G = torch.cat([known_G[1:], known_G[:1]])
    far_G = torch.maximum(points.t_G.abs(), (points.t_G + points.width_G).abs())
    open_G = (points.state_G == FRESH) | (points.state_G == BENT)
    edge_G = (known_G ^ next_G) & (points.width_G > EDGE * far_G)
    lost_G = open_G & ~(known_G & next_G) & ~edge_G
    points.state_G[lost_G | (open_G & (points.width_G <= TINY * far_G))] = LOST


def _split(points: _Points, inner: _Inner, at_S: Tensor) -> tuple[_Points, _Inner]:
    """The intervals `at_S` split at the points inside them; both halves are fresh."""
    points.state_G[at_S] = FRESH
    order = torch.cat([torch.arange(len(points.t_G), dtype=torch.float64), at_S + 0.5]).argsort()
    old = (points.t_G, points.y_GO, points.noise_GO)
    t_G, y_GO, noise_GO = (torch.cat([o, new[at_S]])[order] for o, new in zip(old, inner, strict=True))
    line_G, state_G, *halves = (torch.cat([v, v[at_S]])[order] for v in (points.line_G, points.state_G, *inner))
    return _Points(line_G, t_G, y_GO, noise_GO, state_G), (halves[0], halves[1], halves[2])


def _bends(points: _Points, start_LR: Tensor, direction_LR: Tensor) -> Bends:
    slope_GO, _, first_G, last_G = points.pieces()
    at_S = (points.state_G == BEND).nonzero()[:, 0]
    at_S = at_S[(points.state_G[at_S - 1] == STRAIGHT) & (points.state_G[at_S + 1] == STRAIGHT)]
    before_SO, after_SO = slope_GO[at_S - 1], slope_GO[at_S + 1]
    t_S = points.t_G[at_S] + points.meeting(at_S, before_SO, after_SO)
    room_S = torch.minimum(t_S - first_G[at_S - 1], last_G[at_S + 1] - t_S)
    known_G = torch.isfinite(points.y_GO).all(1)
    line_Q, t_Q = points.line_G[known_G], points.t_G[known_G]
    z_QR = start_LR[line_Q] + t_Q[:, None] * direction_LR[line_Q]
    answers = (z_QR, points.y_GO[known_G], points.noise_GO[known_G])
    return Bends(start_LR, direction_LR, points.line_G[at_S], t_S, after_SO - before_SO, room_S, *answers)
