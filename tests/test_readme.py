"""The README's commands run as they are pasted (with --smoke), and what it says they print is what the code prints."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from distrecon import console, recording
from distrecon.cluster.space import read_space
from distrecon.console import DONE
from distrecon.job import DEFAULT_SPACES
from distrecon.kinds import KINDS
from distrecon.record import kind as write
from distrecon.record.folder import RunFolder
from distrecon.record.journal import SweepRecord
from tests.conftest import CHECKOUT, environment
from tests.test_wrong_uses import MAINS

README = (CHECKOUT / "README.md").read_text()
BLOCKS = [
    re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", README, re.M)
]
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("python -m distrecon.")]
READ: dict = {  # how a cell of each kind is read back
    write.percent: lambda text: float(text) / 100,
    write.two_digits: float,
    write.scientific: float,
    write.whole: float,
    write.sizes: lambda text: [int(size) for size in text.split("-")],
    write.yes_or_no: lambda text: float(text == "yes"),
    str: int,
}


def printed(start):
    """The README's text, without its indentation, from the line that starts with `start` to the end of its block."""
    (block,) = [b[b.index(start) :] for b in BLOCKS if start in b]
    return block.strip("\n")


def read_back(text, kind, swept):
    """The sweep that printed this table, as far as the table tells."""
    title, _, _, *lines = text.splitlines()
    name, metric = re.fullmatch(r"(\S+) \(\* best by (\S+)\)", title).groups()
    columns = KINDS[kind].columns
    record = SweepRecord(name, kind, metric, KINDS[kind].mode)
    for number, line in enumerate(lines):
        value, *cells = line.replace(" *", "  ").split()
        metrics = {c.name: READ[c.write](cell) for c, cell in zip(columns, cells, strict=True) if cell != "-"}
        if " *" in line:  # several rows may be best when they are rounded
            metrics[metric] *= 1 + 1e-6 if record.mode == "max" else 1 - 1e-6
        value = int(value) if value.isdigit() else value
        record.apply({"event": "started", "trial": f"{number:05d}", "config": {swept: value}, "time": 0.0})
        record.apply({"event": "metrics", "trial": f"{number:05d}", "epoch": 0, "metrics": metrics, "time": 0.0})
        record.apply({"event": "finished", "trial": f"{number:05d}", "status": "completed", "error": None, "time": 0.0})
    return record


def test_the_default_run_prints_what_the_readme_shows(monkeypatch, tmp_path):
    shown = printed("loss_weights (* best by")
    losses, recommended, students, _ = shown.split("\n\n")
    records = [
        read_back(losses, "autoencoder", "loss.terms"),
        read_back(recommended, "autoencoder", "model.latent"),
        read_back(students, "expand_cluster", "students.count"),
    ]
    folder = Path(re.search(r"report   (\S+)/report.html", shown)[1])
    tracker = SimpleNamespace(problem=None, viewer=re.search(r"MLflow   (.*)", shown)[1])
    outcome = SimpleNamespace(sweeps=records, folder=RunFolder(folder), tracker=tracker)
    lines = [*recording.tables_and_failures(outcome), *recording.where(outcome, "tune", smoke=False)]
    assert "\n".join(lines).strip() == shown
    for path, record in zip(DEFAULT_SPACES, records, strict=True):
        sweep = read_space(CHECKOUT / path, KINDS)
        assert (sweep.name, sweep.kind.name, sweep.metric, sweep.mode) == (
            record.name,
            record.kind,
            record.metric,
            record.mode,
        )
        (swept,) = sweep.space
        assert [t.config[swept] for t in record.trials.values()] == list(sweep.space[swept].values)


def test_the_tables_fit_80_columns():
    for line in printed("loss_weights (* best by").splitlines():
        assert len(line) <= 80


@pytest.fixture(scope="module")
def pasted(tmp_path_factory, ray_session):
    """A folder in which every command of the README was run in order, and what each printed: (stdout, stderr)."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(CHECKOUT / "examples")
    (folder / "tune_spaces").symlink_to(CHECKOUT / "tune_spaces")
    (folder / "my_sweep.yaml").write_text(re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1])
    said = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for line in COMMANDS:
            said[line] = paste(line)
    return folder, said


def paste(line):
    """Runs one line in this process, at its smallest where its size is not the point."""
    name, *arguments = shlex.split(line.removeprefix("python -m distrecon."))
    small = [] if name in ("recover", "status") or "info" in arguments else ["--smoke"]
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = MAINS[name]([*arguments, *small])
    assert code == DONE, f"{line}\n{out.getvalue()}\n{error.getvalue()}"
    return out.getvalue()


@pytest.mark.slow
def test_every_command_runs_as_it_is_pasted(pasted):
    folder, said = pasted
    assert {line.split()[2].removeprefix("distrecon.") for line in said} == set(MAINS)
    for name in ("my_sweep", "mine"):
        assert (folder / "runs" / name / "report.html").exists()
    assert json.loads((folder / "runs/my_sweep/summary.json").read_text())["sweeps"][0]["name"] == "my_sweep"
    (made,) = (folder / "runs").glob("*-generate")
    assert len(list((made / "models").glob("*.safetensors"))) == 20


@pytest.mark.slow
def test_the_recovery_prints_what_the_readme_shows(pasted):
    (line,) = [line for line in COMMANDS if ".recover " in line]

    def masked(text):
        return re.sub(r"[\d.]+(e[-+]\d+)?", "#", text)

    shown = printed("network      64-20-10")
    assert masked(pasted[1][line]).startswith(masked(shown))
    assert shown.splitlines()[0] == pasted[1][line].splitlines()[0]


@pytest.mark.slow
def test_json_is_the_only_thing_on_stdout(pasted):
    (line,) = [line for line in COMMANDS if line.endswith("--json")]
    document = json.loads(pasted[1][line])
    assert document["command"] == "distrecon.zoo"
    assert (document["exit_code"], document["architecture"]["parameters"]) == (0, 1198)


@pytest.mark.slow
def test_the_python_block_runs(pasted):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=pasted[0], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == re.search(r"# (\[.*)", code)[1]


def test_commands_and_options_of_every_page_exist(capsys):
    """Lines that a page shows are parsed by the command's own parser."""
    for page in [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]:
        text = page.read_text().replace("\\\n", " ")
        for name, rest in re.findall(r"python -m distrecon\.(\w+)([^\n`]*)", text):
            arguments = shlex.split(re.split(r"    | \| ", rest)[0], comments=True)
            parser = sys.modules[MAINS[name].__module__].parser()
            if arguments and "..." not in arguments:
                parser.parse_args(arguments)


def test_the_comparison_is_what_was_measured():
    """Each row of the README's table stands in docs/performance.md, with that ratio (rounded, or measured again)."""
    measured = dict(
        re.findall(r"^\| (.+?) \|.*?\*\*([\d.]+)\*\*", (CHECKOUT / "docs/performance.md").read_text(), re.MULTILINE)
    )
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert len(rows) >= 5
    for what, ratio in rows:
        assert float(ratio) == pytest.approx(float(measured[what]), rel=0.25), what


def test_paths_are_shown_as_a_person_writes_them(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert console.short(tmp_path / "runs" / "x") == os.path.join("runs", "x")
    assert console.short(Path("/elsewhere/x")) == "/elsewhere/x"
