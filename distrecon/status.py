"""python -m distrecon.status: how far a run is, or what it came to: stages, trials, the best so far, time left."""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distrecon import console
from distrecon.errors import UserError
from distrecon.record.folder import RESUMABLE, RunFolder
from distrecon.record.journal import SweepRecord
from distrecon.report.progress import Standing, standing

EXAMPLES = """examples:
  python -m distrecon.status                                  the newest run in runs/
  python -m distrecon.status runs/20260101-120000-tune
  python -m distrecon.status RUN --json

exit codes: 0 running or finished, 1 it broke off or some of its trials failed, 2 the request is wrong
"""


def parser() -> console.Parser:
    parser = console.Parser(
        prog="distrecon.status",
        description="Tell how far a run is, or what it came to. Reads the run folder only.",
        epilog=EXAMPLES,
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run folder (default: the newest in runs/)")
    console.output_options(parser)
    return parser


def run(args: argparse.Namespace) -> console.Answer:
    folder = RunFolder(Path(args.run).absolute()) if args.run else _newest()
    if folder.command is None:
        raise UserError(f"{args.run}: no run there; name the folder that a command printed, or was given with --out")
    working, finished = folder.working, folder.summary.exists()
    state = "running" if working else "finished" if finished else "broken off"
    records = {name: folder.read(name) for name in folder.sweeps()}
    sweeps = [_facts(record, standing(record), working) for record in records.values()]
    failed = any(sweep["failed"] for sweep in sweeps)
    data = {
        "folder": str(folder.path),
        "made_by": f"distrecon.{folder.command}",
        "state": state,
        "stage": folder.last_progress(),
        "sweeps": sweeps,
    }
    lines = [f"run      {console.short(folder.path)}: {folder.command}, {state}", *_stage(folder, state)]
    lines += [line for sweep in sweeps for line in _lines(sweep, working)]
    if not working and not finished and folder.command in RESUMABLE:
        lines.append(
            f"         continue with python -m distrecon.{folder.command} --resume {console.short(folder.path)}"
        )
    if finished and not working:
        lines.append(f"report   {console.short(folder.page)}")
    code = console.SOME_FAILED if state == "broken off" or failed else console.DONE
    return console.Answer(code, "\n".join(lines), data)


def _newest() -> RunFolder:
    requests = sorted(Path("runs").glob("*/request.json"), key=lambda path: path.stat().st_mtime)
    if not requests:
        raise UserError("no run in runs/ here; name a run folder")
    return RunFolder(requests[-1].parent.absolute())


def _stage(folder: RunFolder, state: str) -> Iterator[str]:
    """The last line of progress and how old it is, of a run that has not finished."""
    if state != "finished" and (told := folder.last_progress()):
        ago = console.duration(max(0.0, time.time() - told["time"]))
        yield f"stage    {told['stage']}: {told['text']} ({ago} ago)"


def _facts(record: SweepRecord, now: Standing, working: bool) -> dict[str, Any]:
    """What is told of a sweep; its seconds go on while it runs."""
    seconds = record.seconds + (time.time() - record.last if working and record.last and now.ended < now.total else 0.0)
    left = seconds * (1 / now.share - 1) if working and now.share and 0.05 < now.share < 1 else None
    return {
        "name": record.name,
        "trials": now.total,
        "ended": now.ended,
        "failed": now.failed,
        "running": now.running if working else [],
        "metric": record.metric,
        "best": now.best,
        "value": now.value,
        "seconds": seconds,
        "seconds_left": left,
    }


def _lines(sweep: dict[str, Any], working: bool) -> Iterator[str]:
    """A sweep in a line or two."""
    if not sweep["trials"]:
        yield f"{sweep['name']}: not begun"
        return
    parts = [f"{sweep['ended']} of {sweep['trials']} trials ended"]
    parts += [f"{sweep['failed']} failed"] * bool(sweep["failed"])
    parts += [f"running {', '.join(sweep['running'])}"] * bool(sweep["running"])
    if sweep["seconds_left"] is not None:
        parts.append(f"about {console.duration(sweep['seconds_left'])} left")
    elif not working:
        parts.append(f"in {console.duration(sweep['seconds'])}")
    yield f"{sweep['name']}: {'; '.join(parts)}"
    if sweep["best"] is not None:
        best = "best so far" if sweep["ended"] < sweep["trials"] else "best"
        yield f"         {best} {sweep['best']}: {sweep['metric']} {sweep['value']:.4g}"


def main(argv: list[str] | None = None) -> int:
    return console.run_command(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
