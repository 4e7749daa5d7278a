"""What a black box may be and how it is asked: any function, module or estimator; in parts, again after a fault.

A `torch.nn.Module` is called in its own precision, on its own device, without gradients and in the mode it is in. A
method of a scikit-learn estimator (predict, predict_proba, decision_function) gets and gives numpy arrays. Any other
function is given a float64 tensor; one that cannot take it is given a numpy array, then a float32 tensor, and what it
took first is kept. Answers may be tensors, arrays or nested lists of numbers, [Q] or [Q, O].

Legend: Q queries, I inputs, O outputs.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrecon.errors import UserError, is_out_of_memory

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before a call is repeated; the waits double
SAID = 200  # characters of what a black box said that an error repeats
MISFIT = (
    TypeError,
    AttributeError,
    RuntimeError,
    ValueError,
)  # what a function raises that cannot take a kind of query

Call = Callable[[Tensor], Any]
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "float64 tensor": lambda x_QI: x_QI,
    "numpy array": lambda x_QI: x_QI.numpy(),
    "float32 tensor": lambda x_QI: x_QI.float(),
}


class Answers:
    """The black box as a function of x[Q, I] that gives y[Q, O], both float64 tensors.

    At most `max_rows` rows a call; a call that raises is repeated up to `retries` times after 1, 2, 4, ... seconds (60
    at most). `dtype` is the format of the answers' own numbers. The black box sees queries as [Q, *input_shape], where
    that is given.

    Raises UserError, which repeats what the black box said, when it raises to the end, or gives anything but one row of
    finite numbers for each query.
    """

    def __init__(
        self,
        black_box: Any,
        input_size: int,
        max_rows: int | None = None,
        retries: int = 0,
        sleep: Callable[[float], None] = time.sleep,
        input_shape: tuple[int, ...] | None = None,
    ) -> None:
        for name, value, least in (("input_size", input_size, 1), ("max_rows", max_rows, 1), ("retries", retries, 0)):
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, not {value}")
        self.inputs, self.outputs, self.dtype = input_size, 0, torch.float64
        self.max_rows, self.retries, self.repeated = max_rows, retries, 0
        self._calls, self._sleep = calls_of(black_box), sleep
        self._shape = input_shape or (input_size,)

    def parts(self, x_QI: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Queries and answers of one call after the other, so that each can be kept before the next is made."""
        for part_QI in x_QI.split(self.max_rows or max(len(x_QI), 1)):
            yield part_QI, self._one_call(part_QI)

    def __call__(self, x_QI: Tensor) -> Tensor:
        return torch.cat([y_QO for _, y_QO in self.parts(x_QI)])

    def _one_call(self, x_QI: Tensor) -> Tensor:
        for attempt in range(self.retries + 1):
            try:
                answer = self._first_that_works(x_QI)
                break
            except Exception as error:
                if is_out_of_memory(error):  # no fault of the request, and no repetition helps
                    raise
                if attempt == self.retries:
                    again = f" ({self.retries} repetitions did not help)" if self.retries else ""
                    shape = f"{[len(x_QI), *self._shape]} (input_size={self.inputs})"
                    raise UserError(
                        f"the black box raised at queries of shape {shape}: {said(error)}{again}"
                    ) from error
                self._sleep(min(FIRST_WAIT * 2**attempt, LONGEST_WAIT))
                self.repeated += 1
        y_QO = numbers(answer, len(x_QI), self.outputs)
        self.outputs, self.dtype = y_QO.shape[1], y_QO.dtype if y_QO.is_floating_point() else torch.float64
        return y_QO.double()

    def _first_that_works(self, x_QI: Tensor) -> Any:
        """The answer to the first kind of query that the black box takes; the other kinds are then forgotten."""
        first: Exception | None = None
        for call in self._calls:
            try:
                with torch.no_grad():
                    copy = x_QI.clone()  # what the black box does to it is not seen here
                    answer = call(copy.unflatten(1, self._shape))
            except MISFIT as error:
                first = first or error
                continue
            self._calls = [call]
            return answer
        assert first is not None
        raise first


def calls_of(black_box: Any) -> list[Call]:
    """The ways to call a black box with a float64 tensor, to be tried in this order."""
    if isinstance(black_box, torch.nn.Module):
        like = next(
            (p for p in [*black_box.parameters(), *black_box.buffers()] if p.is_floating_point()),
            torch.zeros(0).double(),
        )
        return [lambda x_QI: black_box(x_QI.to(like.device, like.dtype))]
    if not callable(black_box):
        methods = [name for name in ("predict_proba", "decision_function", "predict") if hasattr(black_box, name)]
        hint = f"; give one of its methods, such as .{methods[0]}" if methods else ""
        raise UserError(f"a {type(black_box).__name__} is not callable{hint}")
    if hasattr(getattr(black_box, "__self__", None), "get_params"):
        return [lambda x_QI: black_box(x_QI.numpy())]
    return [partial(_in_form, black_box, form) for form in FORMS.values()]


def _in_form(black_box: Callable[[Any], Any], form: Callable[[Tensor], Any], x_QI: Tensor) -> Any:
    return black_box(form(x_QI))


def numbers(answer: Any, rows: int, outputs: int) -> Tensor:
    """The answer as y[Q, O] in its own format.

    `outputs` 0: any number of them. Raises UserError when it is nothing of the kind.
    """
    wanted = f"[{rows}, {outputs or 'O'}]"
    try:
        y = answer.detach().cpu() if isinstance(answer, Tensor) else torch.from_numpy(np.asarray(answer))
    except (TypeError, ValueError):
        kind = type(answer).__name__
        if isinstance(answer, np.ndarray | list | tuple) and len(answer) == rows:
            raise UserError(
                f"the black box answers with {answer[0]!r}, not with numbers: ask it for scores or probabilities"
            ) from None
        raise UserError(f"the black box answered with {kind}, not with numbers {wanted}") from None
    if y.is_complex():
        raise UserError("the black box answered with complex numbers; give real and imaginary parts as outputs")
    if y.ndim == 1 and len(y) == rows:
        y = y[:, None]
    if y.ndim != 2 or y.shape != (rows, outputs or y.shape[1]) or not y.shape[1]:
        raise UserError(f"the black box answered {rows} queries with shape {list(y.shape)}, not {wanted}")
    if not torch.isfinite(y).all():
        bad = int((~torch.isfinite(y)).any(1).sum())
        raise UserError(f"the black box answered {bad} of {rows} queries with values that are not finite")
    return y


def said(error: Exception) -> str:
    """An exception as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:SAID]}{'...' if len(text) > SAID else ''}"
