"""What the docs say is what the code does."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distrecon import __main__ as commands

CHECKOUT = Path(__file__).resolve().parent.parent
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]


def test_the_settings_reference_is_up_to_date():
    done = subprocess.run(
        [sys.executable, "docs/make_reference.py", "--check"], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_and_commands_that_a_page_names_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for command in re.findall(r"python -m distrecon\.(\w+)", text):
        assert command in commands.COMMANDS, f"{page.name} names the command {command}"
    for option in re.findall(r"tune_spaces/(\w+)\.yaml", text):
        assert (CHECKOUT / "tune_spaces" / f"{option}.yaml").exists()


def anchors(page):
    """What links into a page may name: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_headings_that_a_page_links_to_exist(page):
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)]+)\)", page.read_text()):
        assert anchor in anchors(page.parent / target if target else page), f"{page.name} links to {target}#{anchor}"


def test_every_command_is_listed_and_has_a_module(capsys):
    assert commands.main([]) == 0
    told = capsys.readouterr().out
    for name in commands.COMMANDS:
        assert f"  {name} " in told
        assert (CHECKOUT / "distrecon" / f"{name}.py").exists()
    assert commands.main(["tunne"]) == 2
    assert "did you mean 'tune'" in capsys.readouterr().err


def test_the_concepts_are_as_the_page_shows():
    blocks = re.findall(r"```python\n(.*?)```", (CHECKOUT / "docs/concepts.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_your_own_module_is_as_the_page_shows():
    text = (CHECKOUT / "docs/extending.md").read_text()
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "SmallResNet" in code]
    done = subprocess.run([sys.executable, "-c", block], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fc.weight" in done.stdout


def test_the_worked_examples_are_one_file_and_a_test_each(tmp_path):
    """Puts each block of docs/extending.md where it says, in a copy of the package, and runs the tests it shows."""
    shutil.copytree(CHECKOUT / "distrecon", tmp_path / "distrecon", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", (CHECKOUT / "docs/extending.md").read_text(), re.DOTALL)
    for name, code in blocks:
        with open(tmp_path / name, "a") as file:
            file.write(f"\n\n{code}" if name.startswith("distrecon/") else code)
    files = [name for name, _ in blocks if name.startswith("tests/")]
    assert len(files) == len(blocks) - len(files) == 3, "a file and a test each"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *files],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout
