"""What commands print: progress that a person can follow, tables that fit 80 columns, one-line errors, exit codes."""

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from distrecon.errors import UserError, WorkFailed

DONE, SOME_FAILED, WRONG_REQUEST, INTERRUPTED = 0, 1, 2, 130
EVERY = 15.0  # seconds between progress lines when the output is not a terminal


class Progress:
    """One stage's progress: rewritten in place on a terminal, a line now and then elsewhere."""

    def __init__(self, stage: str) -> None:
        self.stage, self.terminal = stage, sys.stderr.isatty()
        self.start, self._last, self._text = time.monotonic(), -EVERY, ""

    def show(self, text: str) -> None:
        """Shows where the stage is."""
        now = time.monotonic()
        if text == self._text or (not self.terminal and now - self._last < EVERY):
            return
        self._last, self._text = now, text
        line = f"{self.stage:<9} {text}"
        if self.terminal:
            print(f"\r\033[K{line[:110]}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def done(self, text: str) -> None:
        """Ends the stage with its result."""
        clear = "\r\033[K" if self.terminal else ""
        print(f"{clear}{self.stage:<9} {text} ({duration(time.monotonic() - self.start)})", file=sys.stderr, flush=True)


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


def run_command(
    main: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser, argv: list[str] | None
) -> int:
    """Parses, runs, and turns a wrong request into one line and exit code 2; `--verbose` shows tracebacks."""
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return main(args)
    except UserError as error:
        if args.verbose:
            traceback.print_exc()
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return WRONG_REQUEST
    except (WorkFailed, OSError) as error:
        if args.verbose:
            traceback.print_exc()
        print(f"{parser.prog}: failed: {error}", file=sys.stderr)
        return SOME_FAILED
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def common_options(parser: argparse.ArgumentParser) -> None:
    """Options that every command has."""
    parser.add_argument("--out", metavar="DIR", help="run folder to make (default: runs/<time>-<command>)")
    parser.add_argument("--seed", type=int, help="seed of everything random (default: 0)")
    parser.add_argument("--smoke", action="store_true", help="a tiny instance of every stage; its numbers mean nothing")
    parser.add_argument("--verbose", action="store_true", help="show Ray's and MLflow's messages, and tracebacks")
