"""Frozen dataclasses to plain data (for JSON and YAML) and back: an unknown key or a wrong type is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_origin

import cattrs
import cattrs.cols
import cattrs.v

from raylift.datasets.errors import ConfigError

T = TypeVar("T")

_converter = cattrs.Converter(forbid_extra_keys=True)


def to_plain(value: Any) -> Any:
    """Dictionaries, lists, numbers and strings."""
    return _converter.unstructure(value)


def from_plain(kind: type[T], data: Any, where: str) -> T:
    """The dataclass of that type.

    Raises:
        ConfigError: names every key at fault by its path under `where`.
    """
    try:
        return _converter.structure(data, kind)
    except cattrs.BaseValidationError as error:
        raise ConfigError("; ".join(cattrs.transform_error(error, path=where, format_exception=_explain))) from error
    except (AttributeError, TypeError) as error:
        raise ConfigError(f"expected keys and values, not {data!r:.80} @ {where}") from error


def require_minimum(settings: object, least: float, *names: str) -> None:
    """Check that settings, or all numbers of those that are lists, are not below the least one that makes sense.

    Raises:
        ConfigError: names the first that is.
    """
    for name in names:
        value = getattr(settings, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(number >= least for number in numbers):
            raise ConfigError(f"{name} is {value!r}: give {'numbers of ' * isinstance(value, tuple)}{least} or more")


def require_fraction(settings: object, *names: str) -> None:
    """Check that settings are shares of which something is left: from 0 up to, not including, 1.

    Raises:
        ConfigError: names the first that is not.
    """
    for name in names:
        if not 0 <= getattr(settings, name) < 1:
            raise ConfigError(f"{name} is {getattr(settings, name)}: give a share from 0 up to, not including, 1")


def register_union(base: type, tag: str, kinds: dict[str, type], otherwise: type) -> None:
    """Let a field of the type `base` hold any of the dataclasses that inherit from it.

    Args:
        base: the type that fields are annotated with.
        tag: the field by whose value `from_plain` chooses the dataclass.
        kinds: the dataclass for each value.
        otherwise: the dataclass of data without the tag.
    """

    def structure(value: Any, _: Any) -> Any:
        name = value.get(tag) if isinstance(value, dict) else None
        if name is not None and name not in kinds:
            raise ConfigError(f"no {tag} {name!r:.80}: use one of {', '.join(kinds)}")
        return _converter.structure(value, otherwise if name is None else kinds[name])

    _converter.register_structure_hook_func(lambda kind: kind is base, structure)
    _converter.register_unstructure_hook_func(lambda kind: kind is base, _converter.unstructure)


def _explain(error: BaseException, kind: Any) -> str:
    if isinstance(error, ConfigError | _WrongType) or "not in literal" in str(error):
        return str(error).replace("typing.Literal", "")
    if isinstance(error, AttributeError | TypeError) and hasattr(kind, "__dataclass_fields__"):
        return "expected keys and values"
    return cattrs.v.format_exception(error, kind)


class _WrongType(TypeError):
    """A value that cattrs by itself would convert: 'false' to True, 3.7 to 3, a word to a list of letters."""


def _exactly(*accepted: type) -> Callable[[Any, Any], Any]:
    def structure(value: Any, kind: Any) -> Any:
        if type(value) not in accepted:
            raise _WrongType(f"expected {kind.__name__}, not {value!r:.80}")
        return kind(value)

    return structure


def _number(value: Any, kind: Any) -> float:
    # YAML 1.1 reads 1e-4 as a word.
    if type(value) not in (int, float, str):
        raise _WrongType(f"expected {kind.__name__}, not {value!r:.80}")
    return float(value)


def _no_word(factory: Callable[..., Any]) -> Callable[..., Any]:
    def hook_factory(kind: Any, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
        sequence = factory(kind, converter)

        def structure(value: Any, kind: Any) -> Any:
            if not isinstance(value, list | tuple):
                raise _WrongType(f"expected a list, not {value!r:.80}")
            return sequence(value, kind)

        return structure

    return hook_factory


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is list


def _is_open_tuple(kind: Any) -> bool:
    return get_origin(kind) is tuple and kind.__args__[-1] is Ellipsis


_converter.register_structure_hook(int, _exactly(int))
_converter.register_structure_hook(bool, _exactly(bool))
_converter.register_structure_hook(str, _exactly(str))
_converter.register_structure_hook(float, _number)
_converter.register_structure_hook_factory(_is_list, _no_word(cattrs.cols.list_structure_factory))
_converter.register_structure_hook_factory(_is_open_tuple, _no_word(cattrs.cols.homogenous_tuple_structure_factory))
