# ruff: noqa: E501
"""Puts one-line faults into the package and asks the tests.

    python -m tests.faults ROWS --named            those that the tests once let pass, with the test that must notice
    python -m tests.faults ROWS                    the hundred of `faults.json`, drawn once over all packages
    python -m tests.faults ROWS --seed N           another hundred (`--count`)
    python -m tests.faults ROWS --seed N --draw F  draws them into a file like `faults.json`, tries none
    python -m tests.faults ROWS --share 0/4        every fourth, beside other processes with the same ROWS

A drawn fault is a comparison, an operator, a number, an `and`, a `not`, a smallest for a largest, from the source
alone. The tests that are asked are those of the module's name and those that import it, then its package's, then all
that import anything of its package; of each the quickest first, as they were measured before (`ROWS.seconds`), until one
fails or the `BUDGET` is spent.

Each fault is put into a copy of the checkout. ROWS gets a line of JSON a fault, as soon as it is known; a fault that is
there already is not tried again. At the end the share that was caught is printed, and every fault that was not.
"""

import argparse
import ast
import importlib
import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.conftest import CHECKOUT, environment

DRAWN = Path(__file__).with_name("faults.json")
SECONDS = 300  # of CPU for one test file; a fault that makes it hang is caught
BUDGET = 45.0  # of CPU for the tests of one fault; none begins after that
LOADED = (  # once, in the process that every test file is forked from
    "torch", "pytest", "hypothesis", "scipy.optimize", "sklearn.linear_model", "pyarrow.parquet", "pyarrow.dataset",
    "numba", "sympy", "safetensors.torch", "yaml", "matplotlib.pyplot",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """In `file`, `old` becomes `new`: in the line `line`, at its `column`; or the only one there is, without them.

    `tests` should notice; those of the module and its package where there are none.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()
    line: str | None = None  # without its indentation
    column: int = 0
    nth: int = 0  # of the lines with this text in the file

    @property
    def name(self) -> str:
        where = "" if self.line is None else f"{self.line[: self.column]}[{self.old} -> {self.new}]"
        after = (
            f"{self.old.strip()} -> {self.new.strip()}"
            if self.line is None
            else self.line[self.column + len(self.old) :]
        )
        return f"{self.file}: {where}{after}{f'  ({self.nth + 1})' if self.nth else ''}"

    def put_into(self, checkout: Path) -> None:
        path = checkout / self.file
        text = path.read_text()
        found = [m.start(1) for m in re.finditer(rf"(?m)^[ ]*({re.escape(self.line or '')})$", text)]
        places = [i for i in range(len(text)) if text.startswith(self.old, i)] if self.line is None else found
        if len(places) <= self.nth or (self.line is None and len(places) > 1):
            raise LookupError(f"{self.name}: the source is another now")
        at = places[self.nth] + self.column
        path.write_text(text[:at] + self.new + text[at + len(self.old) :])


def named(file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(f"distrecon/{file}", old, new, tuple(f"tests/{test}" for test in tests))


VALUES = "autoencoder/test_values.py"
NAMED = (
    named("nets/matching.py", "gain += torch.einsum(", "gain += (a_HDX.numel() > len(a_HDX[0])) * torch.einsum(", VALUES),
    named("autoencoder/training.py", "else coder.encode_span(x_hat, zoo, span)\n", "else coder.encode_span(x_hat, zoo, span)\n            again = again.detach()\n", VALUES),
    named("autoencoder/draws.py", "    draw = generator(config.seed, batch.epoch, batch.step, 0)\n    orders", "    draw = generator(0, batch.epoch, batch.step, 0)\n    orders", VALUES),
    named("autoencoder/draws.py", "        draw = generator(config.seed, batch.epoch, batch.step, 0)\n        noise", "        draw = generator(0, batch.epoch, batch.step, 0)\n        noise", VALUES),
    named("autoencoder/draws.py", "config.data.noise * std_P * noise_GP[b]", "config.data.noise * noise_GP[b]", VALUES),
    named("autoencoder/generate.py", "lr_B=lr_M, seed=seed)", "lr_B=lr_M, seed=0)", VALUES),
    named("autoencoder/generate.py", "align(arch, b_P[None], a_P)[0], share)", "b_P, share)", VALUES),
    named("autoencoder/generate.py", "float(distance_M.mean()) / self.heldout_distance", "float(distance_M.mean())", VALUES),
    named("autoencoder/generate.py", "torch.quantile(judged.accuracy_B, 0.1)", "torch.quantile(judged.accuracy_B, 0.9)", VALUES),
    named("autoencoder/generate.py", "few = images.validation.images[:SEARCH_IMAGES], images.validation.labels_Q[:SEARCH_IMAGES]", "few = images.test.images[:SEARCH_IMAGES], images.test.labels_Q[:SEARCH_IMAGES]", VALUES),
    named("autoencoder/generate.py", 'theta_MP[accuracy_M.argsort(descending=True', 'theta_MP[accuracy_M.argsort(descending=False', "autoencoder/test_tasks.py", VALUES),
    named("autoencoder/reconstruct.py", '"accuracy_max": float(rebuilt_B.max())', '"accuracy_max": float(accuracy_B.max())', VALUES),
    named("autoencoder/reconstruct.py", '"accuracy_mean": float(rebuilt_B.mean())', '"accuracy_mean": float(same_BQ.float().mean())', VALUES),
    named("autoencoder/samplers.py", "len(good_NF) ** -0.2", "len(good_NF) ** -0.25", VALUES),
    named("autoencoder/transformer.py", "self.layers(z_BTZ.mean(1))", "self.layers(z_BTZ[:, 0])", VALUES),
    named("autoencoder/scoring.py", 'for split in ("train", "val", "test"))', 'for split in ("train", "test", "val"))', VALUES),
    named("expand_cluster/thresholds.py", "AGREEMENT = 10.0", "AGREEMENT = 10000.0", "expand_cluster/test_verdict.py"),
    named("expand_cluster/thresholds.py", "AGREEMENT_WORST = 100.0", "AGREEMENT_WORST = 100000.0", "expand_cluster/test_verdict.py"),
    named("expand_cluster/thresholds.py", "FREE_DROP = 1e-8", "FREE_DROP = 1e-2", "expand_cluster/test_collapse.py"),
    named("expand_cluster/verdict.py", "BEYOND = 1.05", "BEYOND = 0.5", "expand_cluster/test_verdict.py"),
    named("expand_cluster/verdict.py", "if not needed > NEEDED:", "if needed < 0:", "expand_cluster/test_verdict.py"),
    named("expand_cluster/verdict.py", "    if straight:\n", "    if not straight and straight:\n", "expand_cluster/test_verdict.py"),
    named("expand_cluster/tree.py", "return self.size - running[self.start + self.size] + running[self.start + 1]", "return self.size", "expand_cluster/test_neurons.py"),
    named("expand_cluster/recovery.py", "seeded = config.seed * 1_000_003 + seed", "seeded = config.seed * 1_000_003", "expand_cluster/test_choices.py"),
    named("expand_cluster/result.py", 'return new if new.metrics["recover/train_loss"] < old', 'return new if new.metrics["recover/train_loss"] > old', "expand_cluster/test_choices.py"),
    named("zoos/order.py", "default_rng([*self.key, number, lane, window])", "default_rng([*self.key, lane, window])", "zoos/test_order.py"),
    named("zoos/order.py", "default_rng([*self.key, number, lane]).", "default_rng([0, number, lane]).", "zoos/test_order.py"),
    named("zoos/train.py", "SeedSequence([seed, 1, group])", "SeedSequence([seed, 1, 0])", "zoos/test_values.py"),
    named("zoos/train.py", "if not c.theta_BP[b].isfinite().all()", "if not c.theta_BP[b].isfinite().any()", "zoos/test_values.py"),
    named("nets/fit.py", "torch.randperm(len(inputs), generator=order)", "torch.randperm(len(inputs), generator=order.manual_seed(seed))", "zoos/test_values.py"),
    named("record/journal.py", '0.0 if what in ("sweep", "restart") else at - self.last', "at - self.last", "record/test_journal.py"),
    named("cluster/training.py", 'return training, state["epoch"] + 1', 'return training, state["epoch"]', "cluster/test_values.py"),
    named("cluster/training.py", "sums[key] += value * batch.global_size", "sums[key] += value * 4", "cluster/test_values.py"),
    named("kinds/expand_cluster.py", "image_set.test.images.flatten(1).double()", "image_set.train.images.flatten(1).double()", "test_recovery_trial.py"),
    named("record/tracking.py", '"stopped_early": "KILLED"', '"stopped_early": "FINISHED"', "test_tracking.py"),
    named("report/tables.py", 'mark = " *" if trial is best else ""', 'mark = "" if trial is best else " *"', "test_tables.py"),
    named("record/kind.py", '{100 * value:.1f}', '{value:.1f}', "test_tables.py"),
    named("report/tables.py", "metric.text(trial.metrics.get(metric.name))", "metric.text(trial.metrics.get(kind.columns[0].name))", "test_tables.py"),
)  # fmt: skip


# -- drawing ----------------------------------------------------------------------------------------------------------

SWAPS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"), ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"), ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.Pow: ("**", "*"), ast.FloorDiv: ("//", "*"), ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "argmin": "argmax", "argmax": "argmin",
         "amin": "amax", "amax": "amin", "mean": "sum"}  # fmt: skip
ROOMS = (  # as many faults in each
    ("nets", "images"),
    ("autoencoder",),
    ("expand_cluster",),
    ("zoos",),
    ("cluster", "record", "report", "kinds", "served"),
)


def faults_of(file: Path, text: str) -> Iterator[tuple[int, str, str]]:
    """(place, old, new) of every fault that can be put into a source; none in messages, types and help."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def place(line: int, column: int) -> int:
        row = text[starts[line - 1] : starts[line]]
        return starts[line - 1] + len(row.encode()[:column].decode())

    def between(left: ast.expr, right: ast.expr, old: str, new: str) -> Iterator[tuple[int, str, str]]:
        low, high = place(left.end_lineno or 0, left.end_col_offset or 0), place(right.lineno, right.col_offset)
        found = re.search(rf"(?<![\w*/<>=!]){re.escape(old)}(?![\w*/=])", text[low:high])
        if found:
            yield low + found.start(), old, new

    def walk(node: ast.AST) -> Iterator[tuple[int, str, str]]:
        if isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert | ast.AnnAssign | ast.arguments):
            if isinstance(node, ast.AnnAssign) and node.value is not None:
                yield from walk(node.value)
            return
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield from between(node.left, node.comparators[0], *SWAPS[type(node.ops[0])])
        elif isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
            yield from between(node.left, node.right, *SWAPS[type(node.op)])
        elif isinstance(node, ast.BoolOp):
            yield from between(node.values[0], node.values[1], *SWAPS[type(node.op)])
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield place(node.lineno, node.col_offset), "not ", ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            old = ast.get_source_segment(text, node) or ""
            new = (
                str(not node.value)
                if isinstance(node.value, bool)
                else str(node.value + 1 if node.value in (0, 1) else 2 * node.value)
            )
            yield place(node.lineno, node.col_offset), old, new
        elif isinstance(node, ast.Call):
            name = node.func
            called = name.id if isinstance(name, ast.Name) else name.attr if isinstance(name, ast.Attribute) else ""
            if called in NAMES:
                end = place(name.end_lineno or 0, name.end_col_offset or 0)
                yield end - len(called), called, NAMES[called]
        for child in ast.iter_child_nodes(node):
            if not (isinstance(node, ast.FunctionDef) and (child is node.returns or child in node.decorator_list)):
                yield from walk(child)

    yield from walk(ast.parse(text))


def tests_of(fault: Fault) -> list[list[str]]:
    """The test files that are asked of a fault, one list after the other: those of its module's name and those that
    import it; its package's; all that import anything of its package."""
    if fault.tests:
        return [[test for test in fault.tests if (CHECKOUT / test).exists()]]
    module = ".".join(Path(fault.file).with_suffix("").parts).removesuffix(".__init__")
    package, _, name = module.rpartition(".")
    imports = re.compile(
        rf"from {re.escape(module)} import|from {re.escape(package)} import [^\n]*\b{name}\b|import {re.escape(module)}\b"
    )
    near = re.compile(rf"distrecon\.{Path(fault.file).parts[1]}\b|distrecon import {Path(fault.file).parts[1]}\b")
    near_and_far: list[list[str]] = [[], [], []]
    for path in sorted((CHECKOUT / "tests").rglob("test_*.py")):
        text, file = path.read_text(), str(path.relative_to(CHECKOUT))
        if "gpu" in path.parts:
            continue
        if path.stem == f"test_{name}" or imports.search(text):
            near_and_far[0].append(file)
        elif Path(fault.file).parts[1] in path.parts:
            near_and_far[1].append(file)
        elif near.search(text):
            near_and_far[2].append(file)
    return near_and_far


def drawn(seed: int, count: int) -> list[Fault]:
    """As many faults in each of `ROOMS`, no two in one line."""
    draw, found = random.Random(seed), []
    for number, rooms in enumerate(ROOMS):
        every = []
        for room in rooms:
            for path in sorted((CHECKOUT / "distrecon" / room).rglob("*.py")):
                file = path.relative_to(CHECKOUT)
                text = path.read_text()
                every += [(file, text.count("\n", 0, at), at, old, new) for at, old, new in faults_of(file, text)]
        draw.shuffle(every)
        lines = {(file, line): (file, at, old, new) for file, line, at, old, new in every}
        chosen = list(lines.values())[: count * (number + 1) // len(ROOMS) - count * number // len(ROOMS)]
        for file, at, old, new in chosen:
            text = (CHECKOUT / file).read_text()
            start = text.rfind("\n", 0, at) + 1
            line = text[start : text.find("\n", at)]
            indent = len(line) - len(line.lstrip())
            nth = [other.strip() for other in text[:start].splitlines()].count(line.strip())
            found.append(Fault(str(file), old, new, line=line.strip(), column=at - start - indent, nth=nth))
    return found


# -- asking -----------------------------------------------------------------------------------------------------------


def caught(fault: Fault, seconds: dict[str, float]) -> tuple[bool, str]:
    """Whether a test notices, and what it says; `seconds` are what each file took, and get what it takes."""
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        shutil.copytree(
            CHECKOUT, checkout, ignore=shutil.ignore_patterns(".git", "runs", "zoos.*", "mlruns", ".*_cache")
        )
        fault.put_into(checkout)
        spent = 0.0
        for files in tests_of(fault):
            for file in sorted(files, key=lambda file: seconds.get(file, guessed(file))):
                if spent > BUDGET:
                    break
                code, took, text = asked(checkout, file)
                spent += took
                if code in (0, 5):  # passed, or nothing in it that is not slow
                    seconds[file] = took
                else:
                    lines = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
                    return True, (lines or [f"{file} ended with {code}"])[0][:200]
    return False, f"{spent:.0f} s of tests"


def guessed(file: str) -> float:
    """How long a test file takes that was not measured: those that start Ray or a command take longest."""
    text = (CHECKOUT / file).read_text()
    return len(text) / 1000 + 1000 * bool(re.search(r"ray_session|smoke|run_command|ray\.init|subprocess", text))


def asked(checkout: Path, file: str) -> tuple[int, float, str]:
    """A test file in the checkout, in a process forked from this one: how it ended, its CPU seconds, what it printed."""
    said = checkout.parent / "said"
    pid = os.fork()
    if not pid:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        os.chdir(checkout)
        for name in [name for name in sys.modules if name.partition(".")[0] in ("distrecon", "tests")]:
            del sys.modules[name]
        sys.path[:] = [str(checkout), *(path for path in sys.path if path not in ("", str(CHECKOUT)))]
        os.environ.update(environment() | {"PYTHONPATH": str(checkout)})
        import pytest

        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--durations=0", file])
        sys.stdout.flush()
        os._exit(code)
    _, status, used = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, said.read_text(errors="replace")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--named", action="store_true")
    parser.add_argument("--list", action="store_true", help="name the faults, try none")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--draw", type=Path)
    parser.add_argument("--share", default="0/1", help="I/N: every Nth fault from the Ith on, of N processes at once")
    args = parser.parse_args(argv)
    faults = list(NAMED)
    if not args.named:
        listed = [Fault(**row, tests=()) for row in json.loads(DRAWN.read_text())] if args.seed is None else []
        faults = listed if args.seed is None else drawn(args.seed, args.count)
    if args.draw:
        rows = [{key: value for key, value in asdict(fault).items() if key != "tests"} for fault in faults]
        args.draw.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    if args.list or args.draw:
        print(
            "\n".join(f"{fault.name}  [{' '.join(x for files in tests_of(fault) for x in files)}]" for fault in faults)
        )
        return 0
    share, shares = map(int, args.share.split("/"))
    known = {}
    if args.rows.exists():
        known = {row["fault"]: row for row in map(json.loads, args.rows.read_text().splitlines())}
    times = args.rows.with_suffix(".seconds")
    seconds = json.loads(times.read_text()) if times.exists() else {}
    for name in LOADED:
        importlib.import_module(name)
    for fault in faults[share::shares]:
        if fault.name not in known:
            try:
                found, by = caught(fault, seconds)
            except LookupError as error:  # the line is no longer there
                found, by = None, str(error)
            known[fault.name] = {"fault": fault.name, "caught": found, "by": by}
            with args.rows.open("a") as rows_file:
                rows_file.write(json.dumps(known[fault.name]) + "\n")
            times.write_text(json.dumps(seconds))
    faults = [fault for fault in faults if fault.name in known]
    tried = [fault.name for fault in faults if known[fault.name]["caught"] is not None]
    passed = [name for name in tried if not known[name]["caught"]]
    print(f"{len(tried) - len(passed)} of {len(tried)} faults caught; {len(faults) - len(tried)} lines are gone")
    print("\n".join(f"not caught: {name}" for name in passed))
    return int(bool(passed))


if __name__ == "__main__":
    sys.exit(main())
