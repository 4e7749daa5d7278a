"""Configuration by dotted names: a round trip, and errors that name the key."""

from dataclasses import dataclass, field

import pytest

from distrecon import config
from distrecon.errors import UserError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    name: str | None = None

    def __post_init__(self):
        if self.rate < 0:
            raise UserError("inner.rate must not be negative")


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    sizes: tuple[int, ...] = (1,)
    on: bool = False


def test_flatten_and_replace_are_inverse():
    changed = Outer(Inner(0.5, "x"), (2, 3), True)
    flat = config.flatten(changed)
    assert flat == {"inner.rate": 0.5, "inner.name": "x", "sizes": [2, 3], "on": True}
    assert config.replace(Outer(), flat) == changed


def test_values_are_converted_but_never_bent():
    assert config.replace(Outer(), {"inner.rate": 1}).inner.rate == 1.0
    assert config.replace(Outer(), {"inner.rate": "1e-3"}).inner.rate == 1e-3
    assert config.replace(Outer(), {"inner.name": None}).inner.name is None
    for key, value in [("inner.rate", "fast"), ("inner.rate", True), ("sizes", 3), ("sizes", [1.5]), ("on", 1)]:
        with pytest.raises(UserError, match=f"here: {key}"):
            config.replace(Outer(), {key: value}, "here")


def test_unknown_keys_name_the_nearest():
    with pytest.raises(UserError, match=r"'inner.rat'; did you mean 'inner.rate'"):
        config.replace(Outer(), {"inner.rat": 1.0})


def test_checks_of_the_dataclass_name_the_source():
    with pytest.raises(UserError, match=r"here: inner.rate must not be negative"):
        config.replace(Outer(), {"inner.rate": -1.0}, "here")


def test_assignments_are_yaml():
    assert config.parse_assignments(["a.b=[1, 2]", "c=text", "d=1.5"]) == {"a.b": [1, 2], "c": "text", "d": 1.5}
    with pytest.raises(UserError, match=r"KEY=VALUE"):
        config.parse_assignments(["a.b"])
