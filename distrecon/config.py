"""Configuration: nested frozen dataclasses, addressed by dotted names.

One vocabulary serves everywhere: the dotted field names (`loss.beta`) are the keys of space files, of `--set`, of
MLflow's parameters and of `summary.json`.

What a field may hold stands beside it, and `check`, called by the dataclass's `__post_init__`, holds it to that:

    @dataclass(frozen=True)
    class LossConfig:
        gamma: float = setting(0.05, "share of the contrastive loss", least=0, most=1)

        def __post_init__(self) -> None:
            check(self, "loss")

docs/make_reference.py reads the same: meaning, range and choices of every setting.
"""

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml

from distrecon.errors import UserError, nearest

Config = TypeVar("Config")


@dataclass(frozen=True)
class Setting:
    """What one setting means and may hold; of a list, what each of its values may be.

    Numbers are bounded by `least` or `above` (itself not allowed) and `most`. `choices` are the names allowed, read
    when a value is checked, so that a table may grow. `filled` lists have at least one value.
    """

    about: str = ""
    least: float | None = None
    above: float | None = None
    most: float | None = None
    choices: Collection[str] | None = None
    filled: bool = False

    @property
    def range(self) -> str:
        """In words: "between 0 and 1", "at least 1", "above 0 and at most 1"; empty where every number is allowed."""
        if self.least is not None and self.most is not None:
            return f"between {self.least:g} and {self.most:g}"
        low = [f"at least {self.least:g}"] if self.least is not None else []
        low += [f"above {self.above:g}"] if self.above is not None else []
        return " and ".join([*low, *([f"at most {self.most:g}"] if self.most is not None else [])])

    def check(self, key: str, value: Any) -> None:
        """UserError that names the key and what it may hold."""
        if isinstance(value, list | tuple):
            if self.filled and not value:
                raise UserError(f"{key} is empty: it must list at least one value")
            for each in value:
                self.check(key, each)
        elif self.choices is not None and value is not None and value not in self.choices:
            raise UserError(f"{key}: {value!r} is unknown{nearest(value, self.choices)}")
        elif isinstance(value, int | float):
            check_finite(value, key)
            if abs(value) >= 2**63:
                raise UserError(f"{key} must be smaller than 2^63")
            low = (self.least is None or value >= self.least) and (self.above is None or value > self.above)
            if not low or (self.most is not None and value > self.most):
                raise UserError(f"{key} must be {self.range}, not {value}")


def setting(default: Any, about: str = "", **rules: Any) -> Any:
    """A dataclass field with its `Setting`: `rules` are that class's fields."""
    return dataclasses.field(default=default, metadata={"setting": Setting(about, **rules)})


def settings(config_type: type) -> dict[str, Setting]:
    """Field name -> what it may hold, for every field of a dataclass type; nested ones say nothing here."""
    return {field.name: field.metadata.get("setting", Setting()) for field in dataclasses.fields(config_type)}


def check(config: Any, section: str = "") -> None:
    """UserError that names the first field of `config` that its setting does not allow, or that is not finite.

    `section` is where the dataclass stands in its configuration, such as `loss`.
    """
    for name, rule in settings(type(config)).items():
        rule.check(f"{section}.{name}" if section else name, getattr(config, name))


def check_finite(value: float, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} must be a finite number, not {value}")


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
    the type expected. Each dataclass's own `__post_init__` checks what its settings allow.
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
    """`value` as `kind` (bool, int, finite float, str, tuples of them, unions with None); UserError names `where`."""
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
        if abs(value) >= 2**63:
            raise UserError(f"{where} must be smaller than 2^63")
        return float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, float):
        check_finite(value, where)
    if isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool)):
        return value
    raise UserError(f"{where} must be {kind.__name__}, not {value!r}")


# what PyYAML raises of a text: its own errors, those of dates and numbers that are none, too deep nesting
NOT_YAML = (yaml.YAMLError, ValueError, LookupError, OverflowError, RecursionError)


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """`["loss.beta=0.2", ...]` as dotted names and values, each value read as YAML."""
    values = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"--set wants KEY=VALUE, not {assignment!r}")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except NOT_YAML:
            raise UserError(f"--set {key}: {text!r} is not a value that YAML can read") from None
    return values
