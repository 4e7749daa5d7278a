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


NAMES = {"cosine": 1}


@dataclass(frozen=True)
class Limited:
    share: float = config.setting(0.5, "a share", above=0, most=1)
    many: int = config.setting(2, least=1)
    gamma: float = config.setting(0.1, least=0, most=1)
    shape: str | None = config.setting(None, choices=NAMES)
    rates: tuple[float, ...] = config.setting((0.1,), above=0, filled=True)
    free: float = 0.0
    most: float = config.setting(0.0, most=3)

    def __post_init__(self):
        config.check(self, "part")


@dataclass(frozen=True)
class Whole:
    part: Limited = field(default_factory=Limited)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 0.0}, "here: part.share must be above 0 and at most 1, not 0.0"),
        ({"share": 1.5}, "here: part.share must be above 0 and at most 1, not 1.5"),
        ({"many": 0}, "here: part.many must be at least 1, not 0"),
        ({"gamma": -0.5}, "here: part.gamma must be between 0 and 1, not -0.5"),
        ({"most": 3.5}, "here: part.most must be at most 3, not 3.5"),
        ({"shape": "cosin"}, "here: part.shape: 'cosin' is unknown; did you mean 'cosine'?"),
        ({"rates": []}, "here: part.rates is empty: it must list at least one value"),
        ({"rates": [0.1, 0]}, "here: part.rates must be above 0, not 0.0"),
        ({"free": float("nan")}, "here: part.free must be a finite number, not nan"),
        ({"rates": [1.0, "inf"]}, "here: part.rates must be a finite number, not inf"),
    ],
)
def test_a_setting_says_what_it_may_hold(values, message):
    with pytest.raises(UserError) as error:
        config.replace(Whole(), {f"part.{key}": value for key, value in values.items()}, "here")
    assert str(error.value) == message


def test_bounds_themselves_are_allowed_and_nothing_is_checked_away():
    allowed = {"part.share": 1.0, "part.many": 1, "part.gamma": 0.0, "part.most": 3.0, "part.shape": "cosine"}
    assert config.flatten(config.replace(Whole(), allowed)).items() >= allowed.items()
    with pytest.raises(UserError, match=r"part\.free must be a finite number, not -inf"):
        Limited(free=float("-inf"))


def test_choices_follow_their_table(monkeypatch):
    monkeypatch.setitem(NAMES, "linear", 2)
    assert Limited(shape="linear").shape == "linear"


def test_assignments_are_yaml():
    assert config.parse_assignments(["a.b=[1, 2]", "c=text", "d=1.5"]) == {"a.b": [1, 2], "c": "text", "d": 1.5}
    with pytest.raises(UserError, match=r"KEY=VALUE"):
        config.parse_assignments(["a.b"])
