"""What all parts share: timing, cells of work that are kept when done, tables, pages.

- Ours and the baseline take turns (A B A B ...), after one warm-up each; a ratio is the median over the turns.
- Times are processor seconds of this process, on one thread unless a row says otherwise, so that other work on the
  machine counts little; it still shares caches, which is why only ratios of one run mean anything.
- A part is a number of cells. The rows of a finished cell are appended to a file of JSON lines at once, so that an
  interrupted part goes on where it stopped; delete that file, or ask for `--fresh`, after changing the code.
"""

import json
import math
import os
import platform
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

CPU = torch.device("cpu")
Row = dict[str, Any]


class Cell(NamedTuple):
    """What is measured at once. `key` tells it from all other cells of its part and stands in each of its rows."""

    key: Row
    work: Callable[[], list[Row]]


class Column(NamedTuple):
    """One column of a table: its heading and what it says of the rows of one line."""

    heading: str
    cell: Callable[[Sequence[Row]], str]
    words: bool = False  # words stand at the left, numbers at the right


class Table(NamedTuple):
    """Rows of the same `by` make one line; `total` adds a line of all rows. `plain`: aligned text of 80 columns."""

    columns: tuple[Column, ...]
    by: Callable[[Row], str]
    heading: str = ""
    title: str = ""
    total: bool = False
    plain: bool = False


Tables = tuple[Table, ...] | Callable[[Sequence[Row], Namespace], str]
Options = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Part:
    """One part: what there is to measure with these options, and how finished rows are told.

    `tables` is a function of rows and options where columns do not say it all. `options` are argparse's keywords by
    name. `kept`: finished cells stay on disk. `finish` is called with all rows at the end (pictures).
    """

    cells: Callable[[Namespace], Iterable[Cell]]
    tables: Tables
    options: Options = field(default_factory=dict)
    kept: bool = True
    finish: Callable[[Sequence[Row], Namespace], None] | None = None


# -- timing ------------------------------------------------------------------------------------------------------------


def turns(
    ways: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of every way in every turn, after one unmeasured call of each."""
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = clock()
            way()
            seconds[name].append(clock() - start)
    return seconds


def clock(device: torch.device) -> Callable[[], float]:
    """Processor seconds of this process; wall time on a GPU, once it has done all it was given."""
    if device.type == "cpu":
        return time.process_time

    def finished() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return finished


def timing(
    what: str,
    ours: float,
    baseline: float | None = None,
    ratios: Sequence[float] = (),
    note: str = "",
    **numbers: float,
) -> Row:
    """A row of the suite: seconds; `ratios` are baseline over ours, of which median and extremes are kept."""
    ratio, low, high = (median(ratios), min(ratios), max(ratios)) if ratios else (None, None, None)
    if len(ratios) == 1:
        low = high = None
    seconds = {"ours_seconds": ours, "baseline_seconds": baseline}
    return {"what": what, **seconds, "ratio": ratio, "low": low, "high": high, "note": note, "numbers": numbers}


def compare(
    what: str,
    ours: Callable[[], object],
    baseline: Callable[[], object],
    repeats: int,
    factor: float = 1.0,
    note: str = "",
    device: torch.device = CPU,
    timer: Callable[[], float] | None = None,
) -> Row:
    """One row; `factor` is what the baseline's time has to be multiplied by to be that of equal work."""
    seconds = turns({"baseline": baseline, "ours": ours}, repeats, timer or clock(device))
    ratios = [factor * b / o for b, o in zip(seconds["baseline"], seconds["ours"], strict=True)]
    return timing(what, median(seconds["ours"]), factor * median(seconds["baseline"]), ratios, note)


def matmul_flops(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations a second of torch's matrix product, with the present number of threads."""
    size = 768 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = turns({"product": lambda: a @ b}, 9, clock(device))["product"]
    return 2 * size**3 / median(seconds)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of log cost against log size, by least squares."""
    x, y = torch.tensor(sizes).double().log(), torch.tensor(costs).double().log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def memory(kind: str, pid: str = "self") -> int:
    """Bytes of a process; kind "VmHWM": the most it ever held, shared pages included."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(kind))) * 1024


def machine(device: torch.device = CPU) -> dict[str, str]:
    """What the numbers are measured on."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {"processor": name, "python": platform.python_version(), "torch": torch.__version__}


# -- cells -------------------------------------------------------------------------------------------------------------


def measure(part: Part, args: Namespace) -> dict[str, Any]:
    """The part's rows as plain data, with the machine and its load; only cells that are not on disk are worked."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cells = {_name(cell.key, args): cell for cell in part.cells(args) if _chosen(cell.key, args)}
    done = _kept(args.rows) if part.kept else {}
    for name, rows in _worked({name: cell for name, cell in cells.items() if name not in done}, args):
        done[name] = {
            "name": name,
            "rows": [cells[name].key | row for row in rows],
            "machine": machine(args.device),
            "load": os.getloadavg()[0],
        }
        if part.kept:
            with args.rows.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
            for row in done[name]["rows"]:
                print(line(row), flush=True)
    records = [done[name] for name in cells]
    machines = {json.dumps(record["machine"]): record["machine"] for record in records}
    load = [record["load"] for record in records]
    return {
        "quick": args.quick,
        "device": args.device.type,
        "machines": list(machines.values()),
        "load": [min(load), max(load)] if load else [],
        "rows": [row for record in records for row in record["rows"]],
    }


def _name(key: Row, args: Namespace) -> str:
    return json.dumps(key | {"quick": args.quick, "device": args.device.type}, sort_keys=True)


def _chosen(key: Row, args: Namespace) -> bool:
    texts = getattr(args, "only", None)
    return not texts or any(text in str(value) for text in texts for value in key.values())


def _kept(file: Path) -> dict[str, dict[str, Any]]:
    """Finished cells by name. A last line without its end was being written when the process died, and goes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = file.read_text() if file.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    return {record["name"]: record for record in map(json.loads, whole.splitlines())}


def _worked(cells: Mapping[str, Cell], args: Namespace) -> Iterator[tuple[str, list[Row]]]:
    """Names and rows: one cell after the other, or as they finish on a Ray cluster."""
    if not getattr(args, "ray", False):
        yield from ((name, cell.work()) for name, cell in cells.items())
        return
    import ray

    def work(cell: Cell) -> list[Row]:
        torch.set_num_threads(1)
        return cell.work()

    ray.init(ignore_reinit_error=True)
    names = {ray.remote(work).remote(cell): name for name, cell in cells.items()}
    waiting = list(names)
    while waiting:
        (finished,), waiting = ray.wait(waiting)
        yield names[finished], ray.get(finished)


def line(row: Row) -> str:
    """One row, as it is told while a part is at work."""
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())


# -- columns -----------------------------------------------------------------------------------------------------------


def value(heading: str, key: str, write: Callable[[Any], str] = str, words: bool = False) -> Column:
    """A value that all rows of a line have; nothing where it is missing."""
    return Column(heading, lambda rows: "" if rows[0].get(key) is None else write(rows[0][key]), words)


def share(heading: str, holds: Callable[[Row], bool]) -> Column:
    """How many of a line's rows."""
    return Column(heading, lambda rows: f"{sum(map(holds, rows))} of {len(rows)}")


def spread(heading: str, key: str, factor: float = 1.0, decimals: int = 2) -> Column:
    """Mean and, over several rows, standard deviation."""

    def cell(rows: Sequence[Row]) -> str:
        numbers = [factor * row[key] for row in rows if key in row]
        if not numbers:
            return ""
        middle = f"{mean(numbers):.{decimals}f}"
        return f"{middle}±{stdev(numbers):.{decimals}f}" if len(numbers) > 1 else middle

    return Column(heading, cell)


def percent(heading: str, key: str) -> Column:
    return spread(heading, key, 100, 1)


def extremes(heading: str, key: str, write: Callable[[float], str], *which: Callable[[list[float]], float]) -> Column:
    """`median, max` and the like of a number, over the rows that have it."""

    def cell(rows: Sequence[Row]) -> str:
        numbers = [row[key] for row in rows if row.get(key) is not None]
        return ", ".join(write(of(numbers)) for of in which) if numbers else ""

    return Column(heading, cell)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "not reached"
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _ratio(rows: Sequence[Row]) -> str:
    row = rows[0]
    if row["ratio"] is None:
        return ""
    between = "" if row["low"] is None else f" ({number(row['low'])} to {number(row['high'])})"
    return f"**{number(row['ratio'])}**{between}"


SPEED = Table(
    (
        value("ours", "ours_seconds", duration),
        value("baseline", "baseline_seconds", duration),
        Column("ratio (least to most)", _ratio),
        value("", "note", words=True),
    ),
    by=lambda row: row["what"],
    heading="what",
)


def speed(
    function: Callable[..., list[Row]],
    cases: Iterable[tuple[Any, ...]] = ((),),
    quick: Iterable[tuple[Any, ...]] | None = None,
    options: Options = MappingProxyType({}),
    tables: Tables = (SPEED,),
) -> Part:
    """A part of the suite: `function(args, *case)` gives rows of `timing`; `quick` are the cases of --quick."""

    def cells(args: Namespace) -> Iterator[Cell]:
        for case in cases if quick is None or not args.quick else quick:
            yield Cell({"case": list(case)}, partial(function, args, *case))

    return Part(cells, tables, options, kept=False)


# -- tables and pages --------------------------------------------------------------------------------------------------

HEADING = "### "
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
WIDTH = 80


def written(table: Table, rows: Sequence[Row]) -> str:
    """The table as text; a line of which no column says anything is left out."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(table.by(row), []).append(row)
    if table.total and len(groups) > 1:
        groups["all"] = list(rows)
    body = [[name, *(column.cell(group) for column in table.columns)] for name, group in groups.items()]
    body = [cells for cells in body if any(cells[1:])]
    head = [table.heading, *(column.heading for column in table.columns)]
    title = [table.title] if table.title else []
    if not table.plain:
        rule = ["---", *("---" if column.words else "---:" for column in table.columns)]
        return "\n".join([*title, *([""] if title else []), *(f"| {' | '.join(c)} |" for c in [head, rule, *body])])
    widths = [max(len(cells[i]) for cells in [head, *body]) for i in range(len(head))]
    for cells in [head, *body]:
        numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        title.append(" ".join([cells[0].ljust(widths[0]), *numbers]).rstrip())
    if max(map(len, title)) > WIDTH:
        raise ValueError(f"{table.title}: {max(map(len, title))} columns")
    return "\n".join(title)


def section(title: str, part: Part, found: Mapping[str, Any], args: Namespace) -> str:
    """A part's heading, its tables, and what they were measured on."""
    if not found["rows"]:
        return f"{HEADING}{title}\n\nNot measured: no such device here.\n"
    if callable(part.tables):
        text = part.tables(found["rows"], args)
    else:
        text = "\n\n".join(written(table, found["rows"]) for table in part.tables)
    where = "; ".join(f"{on['processor']}, torch {on['torch']}" for on in found["machines"])
    low, high = (f"{load:.1f}" for load in found["load"])
    load = f"load {low}" if low == high else f"load {low} to {high}"
    return f"{HEADING}{title}\n\n{text}\n\n({'small sizes; ' if found['quick'] else ''}{where}, {load})\n"


def replace_sections(page: Path, sections: Sequence[str], order: Sequence[str]) -> None:
    """Put these sections between the markers of the page, titles in this order; what else stands there stays."""
    head, rest = page.read_text().split(BEGIN)
    old, tail = rest.split(END)
    texts = {}
    for text in [*old.split(HEADING)[1:], *(new.removeprefix(HEADING) for new in sections)]:
        texts[text.splitlines()[0]] = f"{HEADING}{text.strip()}\n"
    titles = sorted(texts, key=lambda title: order.index(title) if title in order else len(order))
    page.write_text(f"{head}{BEGIN}\n\n" + "\n".join(texts[title] for title in titles) + f"\n{END}{tail}")
