"""The pages against the code: commands parse, options, settings and modules exist, the tutorial runs."""

import importlib
import json
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
import tyro
import yaml
from nbclient import NotebookClient

from raylift.datasets import hashed_json
from raylift.datasets.archive.store import Folder
from raylift.datasets.serialization import to_plain
from raylift.platform import cli
from raylift.platform.config import RunConfig, flatten
from raylift.platform.presets import PRESETS
from raylift.platform.training.checkpoint import RUN_FILE

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [*REPOSITORY.glob("*.md"), *sorted((REPOSITORY / "docs").rglob("*.md"))]
TEXTS = {path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
NOTEBOOK = REPOSITORY / "docs/tutorial.ipynb"


def blocks(text: str, kind: str) -> list[str]:
    """Blocks of code of one language, with a title or without."""
    return re.findall(rf"```{kind}(?: title=[^\n]*)?\n(.*?)```", text, re.DOTALL)


def spans(text: str) -> list[str]:
    """Inline code, without what stands in blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def commands() -> list[tuple[str, str]]:
    """Page and words of every line of a shell block that calls raylift, also as a job's entry point."""
    found = []
    for page, text in TEXTS.items():
        for block in blocks(text, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                match = re.search(r"(?:^|-m )raylift (?=[a-z])(.*)", line)
                if match:
                    found.append((page, match[1]))
    return found


class ParsedError(Exception):
    """Raised in place of running what was parsed."""


@pytest.fixture
def parser(monkeypatch, tmp_path):
    """`raylift` that parses its arguments with the real parser and stops there; a run to resume is really there."""
    real = tyro.cli

    def parse(*arguments, **named):
        raise ParsedError(real(*arguments, **named))

    def run(words: list[str]):
        if "--resume" in words and words[0] == "train":
            place = words.index("--resume") + 1
            words = [*words[:place], str(tmp_path / "run"), *words[place + 1 :]]
            with suppress(FileExistsError):
                record = {"config": to_plain(PRESETS["x2ct-gan"])}
                Folder(tmp_path / "run").create(RUN_FILE, hashed_json.encode(record))
        with pytest.raises(ParsedError) as parsed:
            cli.main(words)
        return parsed.value.args[0]

    monkeypatch.setattr(tyro, "cli", parse)
    return run


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: value.replace("/", "."))
def test_every_command_of_the_pages_is_one_the_real_parser_takes(page, line, parser):
    options = parser(shlex.split(line, comments=True))
    assert options is not None, page


def test_the_pages_show_commands_of_every_kind_and_a_parser_that_refuses_is_noticed(parser, capsys):
    lines = [f"{line} " for _, line in commands()]
    assert [name for name in cli.COMMANDS if not any(line.startswith(f"{name} ") for line in lines)] == []
    with pytest.raises(SystemExit):
        parser(["phantom", "--archive", "a", "--no-such-option", "1"])
    assert "no-such-option" in capsys.readouterr().err


def test_every_setting_and_option_that_a_page_names_exists(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "docs/generators"))
    generator, tables = importlib.import_module("commands"), importlib.import_module("setting_tables")
    options = {"--help", "--version", "--preset"}
    for name in cli.COMMANDS:
        for group in tables.groups(*generator.options_of(name)):
            for one in group.settings:
                options |= {f"--{one.key.replace('_', '-')}", *one.aliases}
    settings = {key for run in PRESETS.values() for key in flatten(to_plain(run))}
    prefixes = {key.rsplit(".", depth)[0] for key in settings for depth in (1, 2, 3)}
    sections = {key.split(".")[0] for key in flatten(to_plain(RunConfig()))}
    count = 0
    for page, text in TEXTS.items():
        if page == "CHANGELOG.md":  # names what there was
            continue
        for span in spans(text):
            for flag in re.findall(r"(?:^|\s)(--[a-z][\w.-]*)", span):
                count += 1
                key = flag.removeprefix("--").replace("-", "_")
                assert flag in options | OTHER_PROGRAMS or key in settings, f"{page} names {flag}"
            name, *_ = span.split()
            if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", name) and name.split(".")[0] in sections:
                count += 1
                assert name in settings | prefixes, f"{page} names {name}"
    assert count > 40
    for module in ("commands", "setting_tables"):
        sys.modules.pop(module, None)


OTHER_PROGRAMS = {"--working-dir", "--address", "--submission-id"}
"""Options that pages name of Ray."""


def test_every_module_that_a_page_names_can_be_imported():
    named = {name for text in TEXTS.values() for name in re.findall(r"\braylift(?:\.[a-z_0-9]+)+", text)}
    assert len(named) > 8
    # A module that the reader writes: tests/test_add_a_system.py does.
    for name in named - {"raylift.models.systems.example_net"}:
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), name


def test_every_python_block_of_the_pages_compiles_and_its_imports_of_raylift_exist():
    count = 0
    for page, text in TEXTS.items():
        for block in blocks(text, "python"):
            compile(block, page, "exec")
            imports = [line for line in block.splitlines() if line.startswith("from raylift")]
            exec("\n".join(imports), {})
            count += 1
    assert count >= 3


def test_every_page_writes_drr_out_before_it_uses_the_abbreviation():
    for page, text in TEXTS.items():
        first = re.search(r"\bDRRs?\b", text)
        if first:
            before = " ".join(text[: first.start()].casefold().split())
            assert "digitally reconstructed radiograph" in before[-120:], page


def test_readme_fits_two_screens():
    assert len(TEXTS["README.md"].splitlines()) <= 100


def test_every_page_stands_in_the_navigation_and_the_site_loads_nothing_from_elsewhere():
    site = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = re.findall(r"[\w/-]+\.md", json.dumps(site["nav"]))
    written = {path.relative_to(REPOSITORY / "docs").as_posix() for path in (REPOSITORY / "docs").rglob("*.md")}
    assert written <= set(listed)
    assert site["theme"]["font"] is False
    assert site["use_directory_urls"] is False
    assert "http" not in json.dumps([site["theme"], site["extra"], site["extra_css"], site.get("extra_javascript")])
    # The offline plugin would load a script of this name from the network.
    assert any("iframe-worker" in script for script in site["extra"]["polyfills"])


def test_the_tutorial_runs_and_beats_the_mean_volume_and_is_stored_without_outputs(monkeypatch):
    tutorial = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in tutorial.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    NotebookClient(tutorial, timeout=300, kernel_name="python3").execute()
    printed = "".join(output.text for cell in code for output in cell.outputs if output.output_type == "stream")
    psnr = dict(re.findall(r"^(network|mean volume): PSNR ([\d.]+) dB", printed, re.MULTILINE))
    assert float(psnr["network"]) > float(psnr["mean volume"])
    figures = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(figures) == 2
