"""Strict conversion of frozen dataclasses to plain data for JSON and YAML, and back."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args, get_origin

import cattrs
import cattrs.cols
import cattrs.v

from raylift.datasets.errors import ConfigError

T = TypeVar("T")

_converter = cattrs.Converter(forbid_extra_keys=True)


def to_plain(value: Any) -> Any:
    """Convert to dictionaries, lists, numbers and strings."""
    return _converter.unstructure(value)


def from_plain(kind: type[T], data: Any, where: str) -> T:
    """Convert plain data to a dataclass.

    Raises:
        ConfigError: unknown keys or wrong types; names the path of each under `where`.
    """
    try:
        return _converter.structure(data, kind)
    except cattrs.BaseValidationError as error:
        raise ConfigError("; ".join(cattrs.transform_error(error, path=where, format_exception=_explain))) from error
    except (AttributeError, TypeError) as error:
        raise ConfigError(f"expected keys and values, not {data!r:.80} @ {where}") from error


def require_minimum(settings: object, minimum: float, *names: str) -> None:
    """Check that settings, or all elements of those that are tuples, are not below a minimum.

    Raises:
        ConfigError: names the first one below it.
    """
    for name in names:
        value = getattr(settings, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(number >= minimum for number in numbers):
            raise ConfigError(f"{name} is {value!r}: give {'numbers of ' * isinstance(value, tuple)}{minimum} or more")


def require_fraction(settings: object, *names: str) -> None:
    """Check that settings are fractions in [0, 1).

    Raises:
        ConfigError: names the first one outside.
    """
    for name in names:
        if not 0 <= getattr(settings, name) < 1:
            raise ConfigError(f"{name} is {getattr(settings, name)}: give a fraction in [0, 1)")


def register_union(base: type, tag: str, kinds: dict[str, type], otherwise: type) -> None:
    """Register a tagged union: a field of the type `base` accepts any of its subclasses.

    Args:
        base: the type that fields are annotated with.
        tag: the field whose value selects the dataclass.
        kinds: the dataclass for each value.
        otherwise: the dataclass of data without the tag.
    """

    def structure(value: Any, _: Any) -> Any:
        name = value.get(tag) if isinstance(value, dict) else None
        if name is not None and name not in kinds:
            raise ConfigError(f"unknown {tag} {name!r:.80}: use one of {', '.join(kinds)}")
        return _converter.structure(value, otherwise if name is None else kinds[name])

    _converter.register_structure_hook_func(lambda kind: kind is base, structure)
    _converter.register_unstructure_hook_func(lambda kind: kind is base, _converter.unstructure)


def _explain(error: BaseException, kind: Any) -> str:
    if isinstance(error, ConfigError | _WrongTypeError):
        return str(error)
    if isinstance(error, AttributeError | TypeError) and hasattr(kind, "__dataclass_fields__"):
        return "expected keys and values"
    return cattrs.v.format_exception(error, kind)


class _WrongTypeError(TypeError):
    """A value that cattrs would convert: 'false' to True, 3.7 to 3, a string to a list of characters."""


def _choice(value: Any, kind: Any) -> Any:
    choices = get_args(kind)
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return choice
    close = difflib.get_close_matches(str(value), map(str, choices), n=1)
    nearest = f" (did you mean {close[0]}?)" if close else ""
    raise _WrongTypeError(f"expected one of {', '.join(map(str, choices))}, not {value!r:.80}{nearest}")


def _exactly(*accepted: type) -> Callable[[Any, Any], Any]:
    def structure(value: Any, kind: Any) -> Any:
        if type(value) not in accepted:
            raise _WrongTypeError(f"expected {kind.__name__}, not {value!r:.80}")
        return kind(value)

    return structure


def _number(value: Any, kind: Any) -> float:
    # YAML 1.1 parses 1e-4 as a string.
    if type(value) not in (int, float, str):
        raise _WrongTypeError(f"expected {kind.__name__}, not {value!r:.80}")
    return float(value)


def _no_string(factory: Callable[..., Any]) -> Callable[..., Any]:
    def hook_factory(kind: Any, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
        sequence = factory(kind, converter)

        def structure(value: Any, kind: Any) -> Any:
            if not isinstance(value, list | tuple):
                raise _WrongTypeError(f"expected a list, not {value!r:.80}")
            return sequence(value, kind)

        return structure

    return hook_factory


def _is_choice(kind: Any) -> bool:
    return get_origin(kind) is Literal


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is list


def _is_open_tuple(kind: Any) -> bool:
    return get_origin(kind) is tuple and kind.__args__[-1] is Ellipsis


def _snapshot(value: Any, _: Any) -> int | str:
    if value != "latest" and type(value) is not int:
        raise _WrongTypeError(f"expected a number or latest, not {value!r:.80}")
    snapshot: int | str = value
    return snapshot


_converter.register_structure_hook_func(lambda kind: kind == int | Literal["latest"], _snapshot)
_converter.register_structure_hook_func(_is_choice, _choice)
_converter.register_structure_hook(int, _exactly(int))
_converter.register_structure_hook(bool, _exactly(bool))
_converter.register_structure_hook(str, _exactly(str))
_converter.register_structure_hook(float, _number)
_converter.register_structure_hook_factory(_is_list, _no_string(cattrs.cols.list_structure_factory))
_converter.register_structure_hook_factory(_is_open_tuple, _no_string(cattrs.cols.homogenous_tuple_structure_factory))
