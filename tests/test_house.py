"""Which floor may import which heavy library, and that commands load only what they use."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT, environment

PACKAGE = CHECKOUT / "distrecon"
HEAVY = ("ray", "mlflow", "matplotlib")
ALLOWED = {
    "mlflow": lambda path: path == "record/tracking.py",
    "matplotlib": lambda path: path == "report/figures.py",
    "ray": lambda path: path.startswith(("cluster/", "zoos/")) or path == "kinds/autoencoder.py",
}


def imported(file: Path) -> set[str]:
    """The libraries that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("library", HEAVY)
def test_each_heavy_library_has_its_place(library):
    users = {file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py") if library in imported(file)}
    assert users
    assert [path for path in users if not ALLOWED[library](path)] == []


def loaded(code: str, folder: Path) -> list[str]:
    """Which of these modules a process has loaded after the code."""
    names = (*HEAVY, "ray.tune", "ray.train")
    code += f"\nimport json, sys\nprint(json.dumps([name for name in {names!r} if name in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("floor", ["nets", "autoencoder", "expand_cluster"])
def test_the_mathematics_loads_none_of_them(floor, tmp_path):
    assert loaded(f"import distrecon.{floor}", tmp_path) == []


def test_a_recovery_and_a_report_load_no_tune(tmp_path):
    found = loaded("from distrecon.recover import main\nassert main(['--smoke', '--out', 'run']) == 0", tmp_path)
    assert (tmp_path / "run" / "report.html").exists()
    assert set(found) == {"mlflow", "matplotlib"}


def test_evaluating_and_generating_load_no_tune(smoke, tmp_path):
    folder, out, _ = smoke
    (zoo,) = (folder / "zoos").iterdir()
    code = f"""
from distrecon import evaluate, generate
assert evaluate.main(["--smoke", "--autoencoder", {str(out)!r}, "--zoo", {str(zoo)!r}, "--out", "evaluated"]) == 0
assert generate.main(["--autoencoder", {str(out)!r}, "--count", "2", "--out", "generated"]) == 0
"""
    assert not {"ray.tune", "ray.train"} & set(loaded(code, tmp_path))
