"""Writes docs/settings.md, every setting of the configuration classes with its type, default, range and meaning, and
the tables of options in docs/commands.md.

python docs/make_reference.py            # write
python docs/make_reference.py --check    # fail when a file is out of date
"""

import argparse
import dataclasses
import importlib
import re
import sys
import typing
from pathlib import Path

from distrecon import config
from distrecon.kinds import KINDS
from distrecon.zoos.settings import ZooConfig

SETTINGS, COMMANDS = (Path(__file__).with_name(f"{name}.md") for name in ("settings", "commands"))
HEAD = """# Settings

Written by `python docs/make_reference.py` from the configuration classes. The names are the keys of space files (`base`
and `space`), of `--set KEY=VALUE`, of MLflow's parameters and of `summary.json`.
"""

METRICS_HEAD = """Those that tables show have a heading. A sweep chooses its best trial by `metric`, an objective
(default: `{default}`, mode {mode}).

| metric | heading | | objective |
| --- | --- | --- | --- |"""


def rows(kind: type, prefix: str = "") -> list[str]:
    """A table row a leaf of the nested dataclass."""
    hints, rules, lines = typing.get_type_hints(kind), config.settings(kind), []
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
        rule = rules[field.name]
        note = rule.about.replace("|", "\\|")
        values = rule.range if rule.choices is None else ", ".join(f"`{name}`" for name in rule.choices)
        lines.append(f"| `{prefix}{field.name}` | {type_name.replace('|', 'or')} | `{shown}` | {values} | {note} |")
    return lines


def settings() -> str:
    parts = [HEAD]
    kinds = {f"kind: {name}": kind.config_type for name, kind in KINDS.items()}
    for title, kind in {**kinds, "zoos (distrecon.zoo train)": ZooConfig}.items():
        parts += [
            f"\n## {title}\n",
            "| setting | type | default | values | |",
            "| --- | --- | --- | --- | --- |",
            *rows(kind),
        ]
    for name, kind in KINDS.items():
        parts += [f"\n## metrics of {name}\n", METRICS_HEAD.format(default=kind.objective, mode=kind.mode)]
        for metric in kind.metrics:
            objective = "yes" if metric.objective else ""
            parts.append(f"| `{metric.name}` | {metric.heading} | {metric.meaning} | {objective} |")
    return "\n".join(parts) + "\n"


def options(command: str) -> str:
    """A table of a command's options; `zoo train` names a command of a command."""
    name, *inner = command.split()
    parser = importlib.import_module(f"distrecon.{name}").parser()
    for part in inner:
        (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = commands.choices[part]
    lines = ["| option | |", "| --- | --- |"]
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        name = action.dest if not action.option_strings else " ".join(action.option_strings)
        metavar = " ".join(action.metavar) if isinstance(action.metavar, tuple) else action.metavar
        value = "|".join(action.choices or ()) or metavar or ("N" if action.type else action.dest.upper())
        takes = action.option_strings and action.nargs != 0
        shown = f"{name} {value}" if takes else str(metavar or name)
        cells = (f"`{shown}`", (str(action.help) % vars(action)).replace("<", "&lt;"))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def commands() -> str:
    """docs/commands.md with its tables made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- options {match[1]}: begin -->\n\n{options(match[1])}\n\n<!-- options {match[1]}: end -->"

    pattern = r"<!-- options ([\w ]+): begin -->.*?<!-- options \1: end -->"
    return re.sub(pattern, fill, COMMANDS.read_text(), flags=re.DOTALL)


if __name__ == "__main__":
    for target, text in ((SETTINGS, settings()), (COMMANDS, commands())):
        if "--check" not in sys.argv:
            target.write_text(text)
        elif target.read_text() != text:
            sys.exit(f"docs/{target.name} is out of date: run python docs/make_reference.py")
