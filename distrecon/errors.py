"""The exceptions that users see, each said in one line: a request that cannot be carried out, work that broke off."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """A wrong request: commands print it as one line and exit with 2; from Python it is a ValueError."""


class WorkFailed(RuntimeError):
    """Work that broke off for no fault of the request (a full disk, a lost cluster); commands exit with 1."""


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever using the content of a damaged file raises becomes one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{what} is damaged: {said(error)}") from None


def said(error: BaseException) -> str:
    """An error in one line: its kind, unless that is a mere ValueError, and the first line of what it says."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if type(error) is ValueError and text:
        return text[:300]
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or the known names when none is close."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


OUT_OF_MEMORY = (
    "out of memory: lower optim.batch_size, data.query_pool or students.count, run fewer trials at once "
    "(max_concurrent), or take a machine with more"
)


def is_out_of_memory(error: BaseException | str) -> bool:
    """Whether an error, or the text of another process's, is a lack of memory: Python's, torch's, CUDA's or Ray's."""
    known = r"MemoryError|can't allocate memory|out of memory|running low on memory|Unable to allocate"
    return isinstance(error, MemoryError) or re.search(known, str(error)) is not None
