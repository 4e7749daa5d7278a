"""What commands print: progress that a person can follow, tables that fit 80 columns, one-line errors, exit codes."""

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from distrecon.errors import OUT_OF_MEMORY, UserError, WorkFailed, is_out_of_memory, nearest, printable, redact
from distrecon.files import plain, write_json

DONE, SOME_FAILED, WRONG_REQUEST, INTERRUPTED = 0, 1, 2, 130
EVERY, EVERY_VERBOSE = 60.0, 15.0  # seconds between progress lines when the output is not a terminal
EVERY_KEPT = 5.0  # seconds between those that are kept in the run folder


class Progress:
    """One stage's progress: rewritten in place on a terminal; elsewhere a line a minute, more often with `--verbose`.

    The last line is kept in `file`, where `kept` names one, for `distrecon.status`.
    """

    verbose = False
    file: Path | None = None

    def __init__(self, stage: str) -> None:
        self.stage, self.terminal = stage, sys.stderr.isatty()
        self.start = self._last = time.monotonic()
        self._kept, self._text = -EVERY_KEPT, ""

    def show(self, text: str) -> None:
        """Shows where the stage is."""
        now = time.monotonic()
        if text == self._text:
            return
        if now - self._kept >= EVERY_KEPT:
            self._keep(text)
            self._kept = now
        if not self.terminal and now - self._last < (EVERY_VERBOSE if self.verbose else EVERY):
            return
        self._last, self._text = now, text
        line = printable(redact(f"{self.stage:<9} {text}"))
        if self.terminal:
            print(f"\r\033[K{line[:110]}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def _keep(self, text: str) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # a full disk is told by what has to be written
                write_json(self.file, {"stage": self.stage, "text": redact(text), "time": time.time()})

    def done(self, text: str) -> None:
        """Ends the stage with its result."""
        self._keep(text)
        clear = "\r\033[K" if self.terminal else ""
        line = printable(redact(f"{self.stage:<9} {text} ({duration(time.monotonic() - self.start)})"))
        print(clear + line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def kept(file: Path) -> Iterator[None]:
    """Keeps the last line of progress in a file."""
    before, Progress.file = Progress.file, file
    try:
        yield
    finally:
        Progress.file = before


def time_left(share: float, seconds: float) -> str:
    """Like `about 45 s left`, from the share of the work that was done in `seconds`."""
    return f"about {duration(seconds * (1 / min(share, 1) - 1))} left" if share > 0.05 else "time left unknown yet"


def duration(seconds: float) -> str:
    """3.2 s, 45 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to their widest entry: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def short(path: Path) -> str:
    """A path as a person would write it here: relative when it lies below the working directory."""
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute)


@dataclass(frozen=True)
class Answer:
    """What a command came to: its exit code, the text for people, and the same as data for `--json`."""

    code: int
    text: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and name the nearest option or choice."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        if found := re.match(r"unrecognized arguments: (\S+)", message):
            message = f"unknown option {found[1]!r}{nearest(found[1], self.options())}"
        elif found := re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
            known = [choice.strip(" '") for choice in found[2].split(",")]
            message = f"{message[: found.start()]}{found[1]!r} is unknown{nearest(found[1], known)}"
        raise UserError(f"{message}; see {self.prog} --help")

    def options(self) -> list[str]:
        """Every long option of the command and of its own commands."""
        names = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                names += [name for parser in action.choices.values() for name in parser.options()]
        return names


def run_command(main: Callable[[argparse.Namespace], Answer], parser: Parser, argv: list[str] | None) -> int:
    """Parses, runs, prints, returns the exit code. A wrong request is one line; `--verbose` shows its traceback.

    With `--json` one JSON document is all that goes to stdout, also when the command failed; text goes to stderr.
    """
    argv = sys.argv[1:] if argv is None else argv
    as_json, Progress.verbose = "--json" in argv, "--verbose" in argv
    signal.signal(signal.SIGTERM, _interrupt)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        answer = _answer(main, parser, argv)
        if answer.text:
            print("\n".join(map(printable, redact(answer.text).split("\n"))))
    if as_json:
        print(json.dumps(plain({"command": parser.prog, "exit_code": answer.code, **answer.data}), indent=1))
    return answer.code


def _answer(main: Callable[[argparse.Namespace], Answer], parser: Parser, argv: list[str]) -> Answer:
    try:
        return main(parser.parse_args(argv))
    except UserError as error:
        return _failure(parser, argv, WRONG_REQUEST, "error", str(error))
    except (WorkFailed, OSError) as error:
        return _failure(parser, argv, SOME_FAILED, "failed", str(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _failure(parser, argv, SOME_FAILED, "failed", OUT_OF_MEMORY)
    except KeyboardInterrupt as error:
        print(file=sys.stderr)
        return _failure(parser, argv, INTERRUPTED, "interrupted", str(error))


def _failure(parser: Parser, argv: list[str], code: int, what: str, message: str) -> Answer:
    if "--verbose" in argv and code != INTERRUPTED:
        print(redact(traceback.format_exc()), file=sys.stderr)
    message = printable(redact(message))
    print(f"{parser.prog}: {what}" + (f": {message}" if message else ""), file=sys.stderr)
    return Answer(code, data={"error": message or what})


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def common_options(parser: argparse.ArgumentParser) -> None:
    """Options that every command has."""
    parser.add_argument("--out", metavar="DIR", help="run folder to make (default: runs/<time>-<command>)")
    parser.add_argument("--seed", type=seed, help="seed of everything random (default: 0)")
    parser.add_argument(
        "--register", type=_model_name, metavar="NAME", help="register the (best) model in MLflow under this name"
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny instance of every stage; its numbers mean nothing")
    output_options(parser)


def _model_name(text: str) -> str:
    """A name that MLflow's registry takes; found wrong at once, not when the work is done."""
    if not text.strip() or set(text) & set("/:"):
        raise argparse.ArgumentTypeError(f"a model's name is not empty and has no / or :, unlike {text!r}")
    return text


def seed(text: str) -> int:
    """What `--seed` takes; argparse says the rest."""
    if not 0 <= (value := int(text)) < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0, not {text}")
    return value


def module_option(parser: argparse.ArgumentParser) -> None:
    """What runs the networks of zoos that were made with torch modules."""
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="PACKAGE.FILE:FACTORY",
        help="the torch module of a zoo's networks (of several zoos: repeat it)",
    )


def output_options(parser: argparse.ArgumentParser) -> None:
    """How a command tells what it does."""
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout; text goes to stderr")
    parser.add_argument("--verbose", action="store_true", help="show Ray's and MLflow's messages, progress, tracebacks")
