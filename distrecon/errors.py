"""The exceptions that users see, each said in one line: a request that cannot be carried out, work that broke off."""

import contextlib
import difflib
import os
import re
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """A wrong request: commands print it as one line and exit with 2; from Python it is a ValueError."""


class WorkFailed(RuntimeError):
    """Work that broke off for no fault of the request (a full disk, a lost cluster); commands exit with 1."""


@contextlib.contextmanager
def reading(what: object) -> Iterator[None]:
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


# a user and password before the host, or either of them; names that belong there for some kinds of storage stay
_USERINFO = re.compile(r"([A-Za-z][\w+.-]*)(://)(?:[^\s/@:'\"<>]*:[^\s'\"<>]*@|[^\s/@'\"<>]+@)")
_IN_QUERY = re.compile(r"(?i)([?&;][^=&\s]*(?:secret|token|passw|signature|credential|key)[^=&\s]*=)[^&\s'\"<>]+")
_NAMES_A_PLACE = ("abfs", "abfss", "hdfs", "viewfs", "gs", "gcs", "sftp", "ssh")  # scheme://name@host
_SECRETS = (
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
)


def redact(text: str) -> str:
    """A text without the credentials that addresses and the environment's usual variables hold: `***` in their place.

    Everything that is written or printed passes through it; `files.py` and `console.py` see to that.
    """
    if "://" in text:
        text = _USERINFO.sub(_without, text)
        text = _IN_QUERY.sub(r"\1***", text)
    for name in _SECRETS:
        if len(secret := os.environ.get(name, "")) >= 6:
            text = text.replace(secret, "***")
    return text


def _without(match: re.Match[str]) -> str:
    place = match[1].lower() in _NAMES_A_PLACE and ":" not in match[0].partition("://")[2]
    return match[0] if place else f"{match[1]}{match[2]}***@"


def printable(text: str) -> str:
    """A text without the control characters that names from files may hold: a terminal would obey them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest(name: object, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or the known names when none is close."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


OUT_OF_MEMORY = (
    "out of memory: lower optim.batch_size, data.query_pool or students.count, run fewer trials at once "
    "(max_concurrent), or take a machine with more"
)


def is_out_of_memory(error: BaseException | str) -> bool:
    """Whether an error, or the text of another process's, is a lack of memory: Python's, torch's, CUDA's or Ray's."""
    known = r"MemoryError|can't allocate memory|out of memory|running low on memory|Unable to allocate"
    return isinstance(error, MemoryError) or re.search(known, str(error)) is not None
