import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import yaml

from raylift.datasets.errors import ConfigError
from raylift.datasets.serialization import from_plain, register_union, to_plain


@dataclass(frozen=True)
class Inner:
    count: int = 3
    names: tuple[str, ...] = ("a", "b")


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    lr: float = 1e-4
    on: bool = False
    kind: Literal["x", "y"] = "x"
    maybe: int | None = None
    pair: tuple[float, float] = (1.0, 2.0)
    record: dict[str, Any] = field(default_factory=dict)
    map: Mapping[str, int] = field(default_factory=dict)
    many: tuple[Inner, ...] = ()
    words: list[str] = field(default_factory=list)


FULL = Outer(
    inner=Inner(5, ("frontal",)),
    lr=0.5,
    on=True,
    kind="y",
    maybe=7,
    record={"deep": [1, {"a": None}]},
    map={"a": 1},
    many=(Inner(1), Inner(2, ())),
    words=["w"],
)


@pytest.mark.parametrize("value", [Outer(), FULL])
def test_json_and_yaml_bring_back_an_equal_dataclass(value: Outer) -> None:
    assert from_plain(Outer, json.loads(json.dumps(to_plain(value))), "json") == value
    assert from_plain(Outer, yaml.safe_load(yaml.safe_dump(to_plain(value))), "yaml") == value


def test_missing_keys_take_their_defaults() -> None:
    assert from_plain(Outer, {"inner": {"count": 9}}, "x") == Outer(inner=Inner(9))


def test_a_small_number_as_yaml_reads_it_is_still_a_number() -> None:
    assert yaml.safe_load("lr: 1e-4") == {"lr": "1e-4"}
    assert from_plain(Outer, yaml.safe_load("lr: 1e-4"), "x").lr == 1e-4
    assert from_plain(Outer, {"lr": 2}, "x").lr == 2.0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"on": "false"}, "expected bool, not 'false' @ run.on"),
        ({"on": 1}, "expected bool, not 1 @ run.on"),
        ({"inner": {"count": 3.7}}, "expected int, not 3.7 @ run.inner.count"),
        ({"inner": {"count": "3"}}, "expected int, not '3' @ run.inner.count"),
        ({"inner": {"count": True}}, "expected int, not True @ run.inner.count"),
        ({"inner": {"names": "frontal"}}, "expected a list, not 'frontal' @ run.inner.names"),
        ({"inner": {"names": ["a", 5]}}, "expected str, not 5 @ run.inner.names[1]"),
        ({"inner": {"cuont": 3}}, "extra fields found (cuont) @ run.inner"),
        ({"inner": 3}, "expected keys and values @ run.inner"),
        ({"lr": "fast"}, "expected float @ run.lr"),
        ({"lr": None}, "expected float, not None @ run.lr"),
        ({"kind": "z"}, "expected one of x, y, not 'z' @ run.kind"),
        ({"kind": ["x"]}, "expected one of x, y, not ['x'] @ run.kind"),
        ({"pair": [1, 2, 3]}, "@ run.pair"),
        ({"map": {"a": "1"}}, "expected int, not '1' @ run.map['a']"),
        ({"many": {"count": 1}}, "expected a list, not {'count': 1} @ run.many"),
        ({"words": "word"}, "expected a list, not 'word' @ run.words"),
        ([1, 2], "expected keys and values, not [1, 2] @ run"),
        ("text", "expected keys and values, not 'text' @ run"),
        (None, "expected keys and values, not None @ run"),
    ],
)
def test_a_wrong_value_is_refused_by_its_path_and_what_it_is(data: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_plain(Outer, data, "run")
    assert message in str(caught.value)


def test_all_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        from_plain(Outer, {"on": 3, "inner": {"count": "x", "color": 1}}, "run")
    assert all(path in str(caught.value) for path in ("run.on", "run.inner.count", "(color) @ run.inner"))


def test_a_refusal_of_the_dataclass_itself_keeps_its_words() -> None:
    from raylift.datasets.geometry import Grid

    with pytest.raises(ConfigError, match="grid size 4 is outside 8 to 1024"):
        from_plain(Grid, {"size": 4}, "grid")


@dataclass(frozen=True)
class Shape:
    name: str


@dataclass(frozen=True)
class Circle(Shape):
    name: str = "circle"
    radius: float = 1.0


@dataclass(frozen=True)
class Box(Shape):
    name: str = "square"
    sides: tuple[float, ...] = (1.0,)


register_union(Shape, tag="name", kinds={"circle": Circle, "square": Box, "oblong": Box}, otherwise=Circle)


@dataclass(frozen=True)
class Figure:
    shape: Shape = field(default_factory=Circle)


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        ({"name": "oblong", "sides": [1, 2]}, Box("oblong", (1.0, 2.0))),
        ({"name": "circle", "radius": 3}, Circle(radius=3.0)),
        ({"radius": 3}, Circle(radius=3.0)),
    ],
)
def test_members_of_a_union_are_distinguished_by_their_name(data, shape):
    assert from_plain(Figure, {"shape": data}, "figure") == Figure(shape)
    assert from_plain(Figure, to_plain(Figure(shape)), "figure") == Figure(shape)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "hexagon"}, "unknown name 'hexagon': use one of circle, square, oblong @ figure.shape"),
        ({"name": "square", "radius": 3}, "radius.*figure.shape"),
        ("square", "figure.shape"),
    ],
)
def test_what_fits_no_member_of_a_union_is_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        from_plain(Figure, {"shape": data}, "figure")
