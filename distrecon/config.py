"""Configuration: nested frozen dataclasses, addressed by dotted names.

One vocabulary serves everywhere: the dotted field names (`loss.beta`) are the keys of space files, of `--set`, of
MLflow's parameters and of `summary.json`.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import yaml

from distrecon.errors import UserError, nearest

Config = TypeVar("Config")


def fields(config_type: type) -> dict[str, Any]:
    """Dotted name -> annotated type, for every leaf of a nested dataclass type."""
    leaves: dict[str, Any] = {}
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        if dataclasses.is_dataclass(hints[field.name]):
            leaves |= {f"{field.name}.{name}": kind for name, kind in fields(hints[field.name]).items()}
        else:
            leaves[field.name] = hints[field.name]
    return leaves


def flatten(config: Any) -> dict[str, Any]:
    """Dotted name -> value; tuples become lists, so that the result is plain JSON."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{field.name}.{name}": inner for name, inner in flatten(value).items()}
        else:
            flat[field.name] = list(value) if isinstance(value, tuple) else value
    return flat


def replace(config: Config, values: Mapping[str, Any], source: str = "configuration") -> Config:
    """`config` with the dotted `values` put in.

    Raises UserError that names `source`, the key and, for an unknown key, the nearest known one, or for a wrong type,
    the type expected. Each dataclass's own `__post_init__` checks ranges.
    """
    kinds = fields(type(config))
    nested: dict[str, dict[str, Any]] = {}
    direct: dict[str, Any] = {}
    for key, value in values.items():
        if key not in kinds:
            raise UserError(f"{source}: unknown key {key!r}{nearest(key, kinds)}")
        converted = convert(value, kinds[key], f"{source}: {key}")
        head, _, rest = key.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = converted
        else:
            direct[key] = converted
    for head, inner in nested.items():
        direct[head] = replace(getattr(config, head), inner, source)
    try:
        return dataclasses.replace(config, **direct)  # type: ignore[type-var]
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(source) else f"{source}: {message}") from None


def convert(value: Any, kind: Any, where: str) -> Any:
    """`value` as `kind` (bool, int, float, str, tuples of them, unions with None); UserError names `where`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (a for a in arguments if a is not type(None))
        return convert(value, kind, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} must be a list, not {value!r}")
        return tuple(convert(v, arguments[0], where) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool)):
        return value
    raise UserError(f"{where} must be {kind.__name__}, not {value!r}")


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """`["loss.beta=0.2", ...]` as dotted names and values, each value read as YAML."""
    values = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"--set wants KEY=VALUE, not {assignment!r}")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--set {key}: {text!r} is not a value that YAML can read") from None
    return values
