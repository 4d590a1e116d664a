"""The pages of the site that are generated from the code, as an mkdocs hook: mkdocs calls the `on_...` functions.

Generated are the reference (commands, settings, presets, search spaces, API), the executed tutorial, and copies of the
root's CHANGELOG, CONTRIBUTING and SECURITY and of the benchmarks' results, which the pages link to.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import api
import commands
import notebook
import settings
import spaces
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from raylift.platform.commands import about

REPOSITORY = Path(__file__).resolve().parents[2]
LINK_OR_IMAGE = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")
LINK = re.compile(rf"(?<!!){LINK_OR_IMAGE.pattern}")
SYSTEMS_TABLE = re.compile(r"(?<=<!-- systems: raylift systems --markdown -->\n).*?(?=<!-- end -->)", re.DOTALL)
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


def on_startup(**_: Any) -> None:
    """Copy the package to a folder that mkdocstrings reads."""
    api.copy_package(REPOSITORY, REPOSITORY / ".cache/docs")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the API pages and the benchmarks into the navigation."""
    _extend(config.nav, "Python API", [{page.title: page.uri} for page in api.pages(REPOSITORY)])
    _extend(config.nav, "Benchmarks", [{_title(path): f"benchmarks/{path.name}"} for path in _results()])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every generated page."""
    for uri, content in _generated():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Fill in the table of systems, and turn links to files of the repository into links to their pages.

    Links to files without a page become plain text.
    """
    folder = posixpath.dirname(page.file.src_uri)
    markdown = SYSTEMS_TABLE.sub(lambda _: f"\n{about.systems_table()}\n\n", markdown)

    def resolved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, match["target"]))
        inside = target.removeprefix("docs/") if target.startswith("docs/") else _page_of(target)
        if files.get_file_from_path(inside) is None:
            return match[0] if target.startswith("docs/") else match["text"]
        return f"[{match['text']}]({posixpath.relpath(inside, folder or '.')}{match['anchor'] or ''})"

    return LINK.sub(resolved, markdown)


def _generated() -> Iterator[tuple[str, str | bytes]]:
    """Address and content of every generated file."""
    yield "reference/commands.md", commands.page()
    yield "reference/settings.md", settings.page()
    yield "reference/presets.md", settings.presets_page()
    yield "reference/search-spaces.md", spaces.page(REPOSITORY / "tune_spaces")
    for page in api.pages(REPOSITORY):
        yield page.uri, page.content
    yield from notebook.page(REPOSITORY / "docs/tutorial.ipynb", "tutorial.md")
    yield "benchmarks/index.md", _benchmarks()
    for path in [*(REPOSITORY / name for name in ROOT_PAGES), *_results()]:
        text = path.read_text(encoding="utf-8")
        yield _page_of(path.relative_to(REPOSITORY).as_posix()), _from_root(text, path.parent)


def _page_of(target: str) -> str:
    """The page of a file of the repository that is outside docs/."""
    return f"benchmarks/{Path(target).name}" if target.startswith("benchmarks/results/") else target.lower()


def _results() -> list[Path]:
    return sorted((REPOSITORY / "benchmarks/results").glob("*.md"))


def _benchmarks() -> str:
    lines = [f"* [{_title(path)}]({path.name})" for path in _results()]
    return "\n".join(
        [
            "# Benchmarks",
            "",
            "These are dated results of the scripts in `benchmarks/`, each with machine, versions and command.",
            "",
            *lines,
        ]
    )


def _title(path: Path) -> str:
    """A result's name and date, from its file's: DATE-NAME.md."""
    return f"{path.stem[11:].replace('_', ' ')} ({path.stem[:10]})"


def _from_root(text: str, folder: Path) -> str:
    """Markdown of a file outside docs/, whose links start in its own folder, as a page at the site's root or one below.

    Links and images are rewritten to start in docs/ or docs/benchmarks, as those of the other pages do.
    """
    start = REPOSITORY / "docs" if folder == REPOSITORY else REPOSITORY / "docs/benchmarks"

    def moved(match: re.Match[str]) -> str:
        target = os.path.relpath(folder / match["target"], start)
        return f"[{match['text']}]({Path(target).as_posix()}{match['anchor'] or ''})"

    return LINK_OR_IMAGE.sub(moved, text)


def _extend(nav: Any, title: str, pages: list[dict[str, str]]) -> None:
    """Add pages to the section of that title. KeyError: mkdocs.yml has no such section."""
    for name, below in _sections(nav):
        if name == title:
            below += pages
            return
    raise KeyError(f"mkdocs.yml has no section {title!r} in its nav")


def _sections(nav: Any) -> Iterator[tuple[str, list[Any]]]:
    """Title and entries of every section, at any depth of the navigation."""
    for entry in nav:
        for name, below in entry.items() if isinstance(entry, dict) else ():
            if isinstance(below, list):
                yield name, below
                yield from _sections(below)
