"""Frozen dataclasses of settings as Markdown tables: key, type, default, and the docstring below the field."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro


@dataclass(frozen=True)
class Setting:
    """A field: its dotted key, and cells of a table."""

    key: str
    type: str
    default: str
    meaning: str
    positional: bool = False
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """The fields of one dataclass."""

    prefix: str
    intro: str
    settings: list[Setting]


def groups(owner: type, default: Any = MISSING, prefix: str = "") -> Iterator[Group]:
    """The fields of a dataclass, then those of the dataclasses in it; values are those of `default` where it is given.

    A nested dataclass with `tyro.conf.arg(name="")` has no part in the key, as on the command line.
    """
    own: list[Setting] = []
    nested: list[Group] = []
    hints, docs = get_type_hints(owner, include_extras=True), attribute_docs(owner)
    for field in fields(owner):
        kind, marks = _unwrapped(hints[field.name])
        value = getattr(default, field.name) if default is not MISSING else _default(field)
        if is_dataclass(kind) or is_dataclass(type(value)):
            inlined = any(getattr(mark, "name", None) == "" for mark in marks)
            below = prefix if inlined else f"{prefix}{field.name}."
            part = type(value) if is_dataclass(type(value)) else kind
            subgroups = list(groups(part, value, below))
            if inlined:
                own += subgroups[0].settings
                nested += subgroups[1:]
            else:
                nested += subgroups
            continue
        aliases = next((mark.aliases for mark in marks if getattr(mark, "aliases", None)), None) or ()
        own.append(
            Setting(
                f"{prefix}{field.name}",
                type_name(kind),
                "" if value is MISSING else shown(value),
                docs.get(field.name, ""),
                positional=tyro.conf.Positional in marks,
                aliases=tuple(aliases),
            )
        )
    yield Group(prefix.rstrip("."), description(owner), own)
    yield from nested


def table(settings: list[Setting], *, flags: bool) -> list[str]:
    """Lines of a Markdown table; `flags` writes keys as options of the command line."""
    lines = ["| option | type | default | meaning |" if flags else "| setting | type | default | meaning |"]
    lines.append("| --- | --- | --- | --- |")
    for setting in settings:
        name = setting.key.replace("_", "-").upper() if setting.positional else f"--{setting.key.replace('_', '-')}"
        names = ", ".join(map(breakable, (*setting.aliases, name) if flags else (setting.key,)))
        default = f"`{setting.default}`" if setting.default else ("required" if flags else "")
        lines.append(f"| {names} | {setting.type} | {default} | {_cell(setting.meaning)} |")
    return lines


def breakable(key: str) -> str:
    """A key as code that may be broken behind its dots, underscores and inner hyphens, for narrow screens."""
    head, *rest = re.split(r"(?<=[._])|(?<=\w)(?=-)", key)
    return f"<code><span>{head}</span>{''.join(f'<wbr>{part}' for part in rest)}</code>"


@cache
def attribute_docs(owner: type) -> dict[str, str]:
    """The string below each field of a class and of those it inherits from."""
    meanings: dict[str, str] = {}
    for part in reversed(owner.__mro__):
        if not is_dataclass(part):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and _is_text(below):
                meanings[field.target.id] = inspect.cleandoc(below.value.value)  # type: ignore[attr-defined]
    return meanings


def description(owner: type) -> str:
    """The docstring of a dataclass, without the signature that a dataclass without one gets."""
    text = inspect.cleandoc(owner.__doc__ or "")
    return "" if text.startswith(f"{owner.__name__}(") else text


def type_name(kind: Any) -> str:
    """A type as a reader of a command line expects it: choices by name, numbers and text."""
    kind, _ = _unwrapped(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(part) for part in arguments if part is not type(None))
    if origin in (tuple, list) and arguments:
        many = len(arguments) == 2 and arguments[1] is ...
        plural = {"integer": "integers", "number": "numbers", "path": "paths", "text": "texts"}
        part = type_name(arguments[0])
        return f"any number of {plural.get(part, part)}" if many else ", ".join(map(type_name, arguments))
    names = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def shown(value: Any) -> str:
    """A default as it is written on the command line."""
    if value is None:
        return "none"
    if value == "":
        return '""'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(map(shown, value)) or "none"
    return str(value)


def _unwrapped(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    marks: tuple[Any, ...] = ()
    while get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        marks += tuple(more)
    return kind, marks


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
