"""The type of a setting whose values are the names in a dictionary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

__all__ = ["KeyOf"]

if TYPE_CHECKING:
    # No type checker evaluates a dictionary: for it `KeyOf[str, PARTS]` is `str`.
    from typing import Annotated as KeyOf
else:

    class KeyOf:
        """`KeyOf[str, PARTS]` is the Literal of the keys of `PARTS`, which the command line and YAML files accept."""

        def __class_getitem__(cls, arguments: tuple[type, Any]) -> Any:
            return Literal[tuple(arguments[1])]
