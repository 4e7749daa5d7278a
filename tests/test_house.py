"""The house: imports run downwards, no files form a circle, and each floor knows only the libraries that it may.

All imports count: those at the top of a file, those in functions, those for type checkers alone, and those that an
`__init__.py` names in a string, to load them when they are first used.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components

from tests.conftest import environment

PACKAGE = Path(__file__).resolve().parent.parent / "distrecon"

# files and packages below the top, the lowest first; those of one floor import no other of it
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("config", "files"),
    ("nets",),
    ("images", "console"),
    ("expand_cluster", "zoos"),
    ("autoencoder",),
    ("record",),
    ("cluster", "report"),
    ("kinds",),
    ("served",),
    ("recording", "placing"),
    ("job",),
    ("launch",),
    ("evaluate", "generate", "recover", "train", "tune", "zoo"),
    ("__init__", "__main__"),
)

ALONE = {  # library -> the only rooms that may import it
    "mlflow": {"record", "served"},
    "matplotlib": {"report"},
    "ray.train": {"cluster"},
    "ray.tune": {"cluster"},
    "ray": {"cluster", "zoos"},
}

MATHEMATICS = ("nets", "autoencoder", "expand_cluster")


def imports(package: Path) -> dict[str, set[str]]:
    """Of each module of a package, all that it imports by full name: its own modules, and other libraries'."""
    files = {_name(package, file): file for file in sorted(package.rglob("*.py"))}
    return {module: set(_imported(module, file, files)) - {module} for module, file in files.items()}


def _name(package: Path, file: Path) -> str:
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(module: str, file: Path, files: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if file.name == "__init__.py" else module.rpartition(".")[0]
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *filter(None, [node.module])])
            own = base in files
            for alias in node.names:  # a submodule, or else a name of the module itself
                full = f"{base}.{alias.name}"
                yield full if full in files or not own else base
        elif isinstance(node, ast.Constant) and file.name == "__init__.py":
            yield from {node.value} & files.keys()


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of two or more modules of which each is reached from each."""
    modules = sorted(graph)
    arrows = np.array([[other in graph[module] for other in modules] for module in modules])
    _, circle_of = connected_components(arrows, directed=True, connection="strong")
    members = [
        [module for module, c in zip(modules, circle_of, strict=True) if c == circle] for circle in set(circle_of)
    ]
    return sorted(found for found in members if len(found) > 1)


def room(module: str) -> str:
    """The file or package directly below the top that a module is in."""
    return module.split(".")[1] if "." in module else "__init__"


def upwards(graph: dict[str, set[str]], floors: tuple[tuple[str, ...], ...]) -> list[str]:
    """Imports between rooms that do not go to a lower floor; a room without a floor is above all."""
    declared = {name: number for number, names in enumerate(floors) for name in names}
    floor = {room(module): declared.get(room(module), len(floors)) for module in graph}
    return [
        f"{module} (floor {floor[room(module)]}) imports {other} (floor {floor[room(other)]})"
        for module, others in graph.items()
        for other in sorted(others & graph.keys())
        if room(module) != room(other) and floor[room(other)] >= floor[room(module)]
    ]


def misplaced(graph: dict[str, set[str]], alone: dict[str, set[str]]) -> list[str]:
    """Imports of a library by a room that may not."""
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in sorted(others)
        for library, rooms in alone.items()
        if f"{other}.".startswith(f"{library}.") and room(module) not in rooms
    ]


GRAPH = imports(PACKAGE)


def test_no_files_import_each_other_or_form_a_circle() -> None:
    assert circles(GRAPH) == []


def test_every_room_has_a_floor() -> None:
    rooms, declared = {room(module) for module in GRAPH}, [name for names in FLOORS for name in names]
    assert sorted(rooms) == sorted(declared)


def test_imports_run_downwards() -> None:
    assert upwards(GRAPH, FLOORS) == []


def test_each_library_is_imported_only_where_it_may_be() -> None:
    assert misplaced(GRAPH, ALONE) == []


@pytest.mark.parametrize("floor", MATHEMATICS)
def test_the_mathematics_loads_without_ray_mlflow_and_matplotlib(floor: str) -> None:
    """Every module of the floor, in a process where those cannot be imported."""
    modules = [module for module in GRAPH if room(module) == floor]
    assert f"distrecon.{floor}" in modules
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys(("ray", "mlflow", "matplotlib")))  # None: importing it fails
for module in {modules}:
    importlib.import_module(module)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def write(folder: Path, files: dict[str, str]) -> dict[str, set[str]]:
    """The imports of a package made for a test."""
    for name, text in files.items():
        path = folder / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return imports(folder / "house")


def test_imports_of_every_form_are_seen(tmp_path: Path) -> None:
    graph = write(
        tmp_path,
        {
            "__init__.py": "HOMES = {'x': 'house.side'}",
            "low/__init__.py": "from house.low import a",
            "low/a.py": "import numpy as np\nfrom ray.train import Checkpoint\nfrom ray import tune",
            "low/b.py": "def f():\n    from . import a\n    from .a import x\n    from ..top import g",
            "top.py": "if TYPE_CHECKING:\n    from house.low.b import f\nimport house.low",
            "side.py": "NAME = 'house.top'",
        },
    )
    assert graph["house.low"] == {"house.low.a"}
    assert graph["house.low.a"] == {"numpy", "ray.train.Checkpoint", "ray.tune"}
    assert graph["house.low.b"] == {"house.low.a", "house.top"}
    assert graph["house.top"] == {"house.low.b", "house.low"}
    assert circles(graph) == [["house.low.b", "house.top"]]
    assert (graph["house"], graph["house.side"]) == ({"house.side"}, set())
    assert upwards(graph, (("low",), ("top",), ("__init__",))) == [
        "house (floor 2) imports house.side (floor 3)",
        "house.low.b (floor 0) imports house.top (floor 1)",
    ]
    assert misplaced(graph, {"ray.tune": {"top"}, "num": set()}) == ["house.low.a imports ray.tune"]


def test_a_longer_circle_is_found_whole(tmp_path: Path) -> None:
    files = {
        "a.py": "from house import b",
        "b.py": "import house.c",
        "c.py": "from house.a import x",
        "d.py": "import house.a",
    }
    assert circles(write(tmp_path, {"__init__.py": "", **files})) == [["house.a", "house.b", "house.c"]]


# -- what commands load ------------------------------------------------------------------------------------------------


def loaded(code: str, folder: Path) -> list[str]:
    """Which of these modules a process has loaded after the code."""
    names = ("ray", "mlflow", "matplotlib", "ray.tune", "ray.train")
    code += f"\nimport json, sys\nprint(json.dumps([name for name in {names!r} if name in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


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
