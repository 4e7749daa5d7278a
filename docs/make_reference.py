"""Writes docs/settings.md: every setting of the configuration classes, with its type, default and comment.

python docs/make_reference.py            # write
python docs/make_reference.py --check    # fail when the file is out of date
"""

import dataclasses
import inspect
import re
import sys
import typing
from pathlib import Path

from distrecon import config
from distrecon.cluster.kinds import KINDS
from distrecon.zoos.settings import ZooConfig

TARGET = Path(__file__).with_name("settings.md")
HEAD = """# Settings

Written by `python docs/make_reference.py` from the configuration classes. The names are the keys of space files (`base`
and `space`), of `--set KEY=VALUE`, of MLflow's parameters and of `summary.json`.
"""


def comments(kind: type) -> dict[str, str]:
    """Field -> the comment behind it in the source of the class or of those it extends."""
    found: dict[str, str] = {}
    for parent in reversed(kind.__mro__[:-1]):
        for line in inspect.getsource(parent).splitlines():
            match = re.match(r"    (\w+): .*?  # (.*)", line)
            if match:
                found[match[1]] = match[2]
    return found


def rows(kind: type, prefix: str = "") -> list[str]:
    """A table row a leaf of the nested dataclass."""
    hints, notes, lines = typing.get_type_hints(kind), comments(kind), []
    for field in dataclasses.fields(kind):
        annotation = hints[field.name]
        if dataclasses.is_dataclass(annotation):
            lines += rows(annotation, f"{prefix}{field.name}.")
            continue
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        shown = config.flatten(kind())[field.name] if not isinstance(default, str) else default
        type_name = (
            getattr(annotation, "__name__", str(annotation)) if not typing.get_args(annotation) else str(annotation)
        )
        note = notes.get(field.name, "").replace("|", "\\|")
        lines.append(f"| `{prefix}{field.name}` | {type_name.replace('|', 'or')} | `{shown}` | {note} |")
    return lines


def text() -> str:
    parts = [HEAD]
    kinds = {f"kind: {name}": kind.config_type for name, kind in KINDS.items()}
    for title, kind in {**kinds, "zoos (distrecon.zoo train)": ZooConfig}.items():
        parts += [f"\n## {title}\n", "| setting | type | default | |", "| --- | --- | --- | --- |", *rows(kind)]
    for name, kind in KINDS.items():
        parts.append(f"\nObjectives of {name} (`metric`): {', '.join(f'`{m}`' for m in kind.metrics)}.")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit("docs/settings.md is out of date" if TARGET.read_text() != text() else 0)
    TARGET.write_text(text())
