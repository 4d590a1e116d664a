"""API pages: one for each folder of the package, a section for each module, filled by mkdocstrings from docstrings."""

from __future__ import annotations

import ast
import shutil
from dataclasses import dataclass
from pathlib import Path

FOLDERS = ("datasets", "models", "platform", "serve")
LEFT_OUT = ("platform/commands", "serve/page")
"""Folders without an API page: the command line has its own page, and the web page is not imported elsewhere."""


@dataclass(frozen=True)
class ApiPage:
    """A page: its title in the navigation, its address and its Markdown."""

    title: str
    uri: str
    content: str


def pages(repository: Path) -> list[ApiPage]:
    """The pages of all folders, in the order of the data flow."""
    made = []
    for top in FOLDERS:
        inner = sorted(path for path in (repository / top).rglob("*") if path.is_dir() and path.name != "__pycache__")
        for folder in (repository / top, *inner):
            name = folder.relative_to(repository).as_posix()
            modules = sorted(path for path in folder.glob("*.py") if not path.stem.startswith("__"))
            if modules and name not in LEFT_OUT:
                made.append(_page(name, modules))
    return made


def _page(folder: str, modules: list[Path]) -> ApiPage:
    dotted = folder.replace("/", ".")
    lines = [f"# raylift.{dotted}", "", "| module | content |", "| --- | --- |"]
    names = [f"raylift.{dotted}.{path.stem}" for path in modules]
    lines += [f"| [`{path.stem}`][{name}] | {_summary(path)} |" for path, name in zip(modules, names, strict=True)]
    for name in names:
        lines += ["", f"::: {name}"]
    return ApiPage(dotted, f"reference/api/{dotted}.md", "\n".join(lines) + "\n")


def _summary(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def copy_package(repository: Path, target: Path) -> None:
    """Copy the package in the layout of a wheel, for static analysis: raylift/ with its folders inside.

    Each folder gets an `__init__.py`, which none has in the repository.
    """
    shutil.rmtree(target, ignore_errors=True)
    for source in ("raylift", *FOLDERS):
        place = target / "raylift" / ("" if source == "raylift" else source)
        shutil.copytree(
            repository / source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    for folder in (path for path in (target / "raylift").rglob("*") if path.is_dir()):
        (folder / "__init__.py").touch()
