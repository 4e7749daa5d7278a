"""A black box examined before its recovery: how to ask it, what it is, and where it lives.

First the answers themselves (repeatable? labels? probabilities? rounded?), then the surroundings (from data, domain, or
by asking), then what kind of function it is there. What comes out is the black box in standard inputs and scores, which
the method works in, and the findings; some of them stop a recovery before it starts.

Legend: Q queries, I inputs, O outputs.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrecon.errors import UserError, nearest
from distrecon.expand_cluster.answers import Answers
from distrecon.expand_cluster.blackbox import BlackBox, Function, Memory
from distrecon.expand_cluster.diagnosis import Finding, clamped, diagnose_answers, diagnose_function, normalised
from distrecon.expand_cluster.kept import KeptAnswers
from distrecon.expand_cluster.odds import Odds
from distrecon.expand_cluster.standard import Standard
from distrecon.expand_cluster.surroundings import (
    Bound,
    Surroundings,
    by_asking,
    from_data,
    from_domain,
    read_domain,
)
from distrecon.expand_cluster.symptoms import Sample, number_format

OUTPUTS = ("values", "probabilities")
SAME_BOX = 1e-5  # relative difference of an answer asked again at which kept answers are another black box's
THOROUGH = 20_000  # a smaller budget is not spent on what kind of function it is
ROUNDED = 20.0  # steps of the answers' format, or times their noise: smaller second differences may be rounding
LEAST_VISIBLE = 1e-10  # of the answers
FAR_KNOWN = tuple(2.0**k for k in range(10, -3, -1))  # half widths at which probabilities may still tell scores
KNOWN = 0.95  # share of the queries that must
SOME = 0.1  # share of the first queries that do where a smaller one may be due to other scales of the inputs


@dataclass(frozen=True)
class Examined:
    """The black box in standard inputs and scores, the draws it was looked at with, and what was found about it."""

    box: BlackBox
    sample: Sample
    findings: list[Finding]

    @property
    def around(self) -> Surroundings:
        """Centre, scale and domain of the inputs."""
        return self.sample.around

    @property
    def stopped(self) -> Finding | None:
        """The finding that stops the recovery, if one does."""
        return next((found for found in self.findings if found.stops), None)

    def named(self, name: str) -> Finding | None:
        """The finding of that name, if there is one."""
        return _named(self.findings, name)


def examine(
    black_box: Any,
    input_size: int,
    data: Tensor | None,
    domain: tuple[Bound, Bound] | None,
    outputs: str,
    max_rows: int | None,
    retries: int,
    answers: str | Path | None,
    budget: int,
    generator: torch.Generator,
    hidden_layers: int | None = None,
    image: tuple[int, ...] | None = None,
    pooled: bool = False,
) -> Examined:
    """All that can be told of a black box before its recovery. The arguments are `recover_network`'s;
    `hidden_layers` is None for a convolutional network.

    Where it reads images [Q, *image], all inputs have one scale, and their centre is 0. `pooled`: it may have max
    pooling, whose kinks lie between curves.

    Raises UserError for a wrong request, or when the black box raises or gives no numbers.
    """
    if outputs not in OUTPUTS:
        raise UserError(f"unknown outputs {outputs!r}{nearest(outputs, OUTPUTS)}")
    ask_again = Answers(black_box, input_size, max_rows, retries, input_shape=image)
    low_I, high_I = read_domain(domain, input_size)
    if data is not None:
        around = from_data(data, low_I, high_I)
    else:
        around = from_domain(low_I, high_I)
    around = around.uniform() if image and around.bounded | (data is not None) else around
    asked = _keeping(ask_again, answers, input_size) if answers is not None else ask_again
    raw = Memory(asked, budget)
    sample = Sample.draw(around.asked(raw), around, generator)
    findings = diagnose_answers(sample, around.asked(ask_again))
    odds, thorough = None, raw.left() > THOROUGH
    if not _stopped(findings) and (outputs == "probabilities" or _named(findings, "probabilities")):
        odds = Odds.of(sample.y_QO, ask_again.dtype, float(sample.quantum_O.max()))
    ask: Function = raw if odds is None else _visible_scores(raw, odds)
    told = None if odds is None else partial(_share_known, raw, odds, sample.u_QI)
    if not _stopped(findings) and thorough and data is None and domain is None:
        if ask_again.dtype != torch.float16:  # which overflows soon
            findings += [*normalised(sample, raw), *clamped(sample)]
        if not _stopped(findings):
            around = _elsewhere(ask, ask_again.dtype, sample, findings, raw.left(), image is not None, told)
    if _stopped(findings):
        return _examined(findings, sample, raw, None)
    limits = None
    if odds is not None:
        around = _centred(raw, odds, around, sample.u_QI)
        limits, around = around, _where_known(raw, odds, around, generator)
    if around is not sample.around:
        moved = Sample.draw(around.asked(ask), around, generator, odds)
        if odds is not None or _varies(moved):  # else it is somewhere between: where it was asked first
            sample = moved
    told_nowhere = odds is not None and not odds.known(raw(around.inputs(sample.u_QI))).any()
    if not _varies(sample) or told_nowhere:
        evidence = f"{len(sample.y_QO)} queries gave " + ("only 0 and 1" if told_nowhere else "one answer")
        findings.append(Finding("constant", evidence, "data= may show where it is not", True))
    elif thorough:
        findings += diagnose_function(sample, hidden_layers, pooled)
    return _examined(findings, sample, raw, odds, limits)


def _varies(sample: Sample) -> bool:
    return bool((sample.y_QO != sample.y_QO[:1]).any())


def _stopped(findings: list[Finding]) -> bool:
    return any(found.stops for found in findings)


def _named(findings: list[Finding], name: str) -> Finding | None:
    return next((found for found in findings if found.name == name), None)


def _elsewhere(
    ask: Function,
    dtype: torch.dtype,
    sample: Sample,
    findings: list[Finding],
    left: float,
    uniform: bool,
    told: Callable[[Surroundings], float] | None,
) -> Surroundings:
    """Surroundings of a black box of which nothing is said: inside its limits, or by asking.

    `told`: the share of queries there whose probabilities tell their scores. Where only some do, the ends of what is
    told look like bends: then bends tell no centre, and a scale only if it makes that share larger.
    """
    limits = _named(findings, "clamped inputs")
    if limits is not None:
        around = from_domain(limits.values["low"], limits.values["high"])
        return around.uniform() if uniform else around
    around, here = sample.around, told(sample.around) if told is not None else 1.0
    if uniform or SOME < here < 1:
        return around
    if dtype == torch.float16:
        largest_I = torch.full_like(around.scale_I, torch.finfo(dtype).max ** 0.5)
        around = Surroundings(around.centre_I, around.scale_I, -largest_I, largest_I)
    coarse = max(torch.finfo(dtype).eps, *(number_format(y_Q).eps for y_Q in sample.y_QO.T if y_Q.any()))
    hidden_O = ROUNDED * sample.quantum_O if told is None else torch.zeros(())  # scores have no such steps
    noise_O = torch.maximum(sample.quantum_O, sample.noise_O) / sample.y_QO.abs().amax(0).clamp(min=1e-300)
    visible = max(LEAST_VISIBLE, ROUNDED * max(coarse, float(noise_O.max())))
    found = by_asking(ask, around, sample.generator, visible, left, told is not None, hidden_O)
    if told is None or here == 1:
        return found
    closer = replace(around, scale_I=found.scale_I)
    return closer if told(closer) > here else around


def _examined(
    findings: list[Finding], sample: Sample, raw: Memory, odds: Odds | None, limits: Surroundings | None = None
) -> Examined:
    findings = sorted(findings, key=lambda found: not found.stops)
    standard = Standard(sample.around, odds, sample.y_QO.mean(0), sample.scale_O, limits)
    noise_O, rounded_O = sample.noise_O / sample.scale_O, sample.quantum_O > 0
    box = BlackBox(raw, sample.inputs, standard=standard, noise_O=noise_O, rounded_O=rounded_O)
    return Examined(box, sample, findings)


def _visible_scores(raw: Memory, odds: Odds) -> Callable[[Tensor], Tensor]:
    """Scores as far as they can be seen: where a probability is 0 or 1 they stay at the last that can be told."""
    format_ = torch.finfo(odds.dtype)
    if odds.reference is not None:
        return lambda x_QI: odds(raw(x_QI).clamp(format_.tiny, 1 - format_.eps / 2))
    least, column = max(format_.tiny, odds.quantum), slice(odds.column, odds.column + 1)
    return lambda x_QI: raw(x_QI)[:, column].clamp(least, 1 - format_.eps / 2).logit()


def _share_known(raw: Memory, odds: Odds, u_QI: Tensor, around: Surroundings) -> float:
    """Share of queries whose probabilities tell their scores."""
    return float(odds.known(raw(around.inputs(u_QI))).double().mean())


def _centred(raw: Memory, odds: Odds, around: Surroundings, u_QI: Tensor) -> Surroundings:
    """The same surroundings, round the nearest query whose answer tells scores where that of their centre does not."""
    near_QI = torch.cat([torch.zeros_like(u_QI[:1]), u_QI[u_QI.norm(dim=1).argsort()]])
    known_Q = odds.known(raw(around.inputs(near_QI)))
    if not known_Q.any():
        return around
    return replace(around, centre_I=around.inputs(near_QI[known_Q][:1])[0])


def _where_known(raw: Memory, odds: Odds, around: Surroundings, generator: torch.Generator) -> Surroundings:
    """The largest box of standard inputs in which probabilities still tell the scores, as the domain."""
    for half in FAR_KNOWN:
        u_QI = half * (2 * torch.rand(100, len(around.scale_I), generator=generator, dtype=torch.float64) - 1)
        if _share_known(raw, odds, u_QI, around) >= KNOWN:
            break
    low_I = torch.maximum(around.low_I, around.centre_I - half * around.scale_I)
    high_I = torch.minimum(around.high_I, around.centre_I + half * around.scale_I)
    return Surroundings(around.centre_I, around.scale_I, low_I, high_I)


def _keeping(answers: Answers, folder: str | Path, input_size: int) -> Function:
    """The answers of a folder where it has them; others are asked for and kept at once.

    Raises UserError when the first or last kept query is answered differently now: another black box's.
    """
    kept = KeptAnswers(folder, input_size)
    x_QI, y_QO = kept.rows()
    if len(x_QI):
        ends = torch.tensor([0, len(x_QI) - 1])
        now_QO = answers(x_QI[ends])
        if now_QO.shape[1] != y_QO.shape[1] or (now_QO - y_QO[ends]).abs().max() > SAME_BOX * y_QO.abs().max():
            kept.close()
            raise UserError(f"answers={folder}: this black box answers a kept query differently; choose another folder")
    known = {_key(row): y for row, y in zip(x_QI.numpy(), y_QO.numpy(), strict=True)}

    def answer(x_QI: Tensor) -> Tensor:
        rows = x_QI.contiguous().numpy()
        fresh = torch.tensor([_key(row) not in known for row in rows], dtype=torch.bool)
        if fresh.any():
            for part_QI, part_QO in answers.parts(x_QI[fresh]):
                kept.append(part_QI, part_QO)
                known.update((_key(row), y) for row, y in zip(part_QI.numpy(), part_QO.numpy(), strict=True))
        return torch.from_numpy(np.stack([known[_key(row)] for row in rows]))

    return answer


def _key(row: np.ndarray) -> bytes:
    return hashlib.blake2b(row.tobytes(), digest_size=16).digest()
