"""docs/how-to/add-a-system.md, followed literally on a copy of the checkout."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs/how-to/add-a-system.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The files that git tracks or would add, changed as on the page."""
    copy = tmp_path_factory.mktemp("checkout")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines():
        source, target = REPOSITORY / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink() or source.is_file():
            shutil.copy2(source, target, follow_symlinks=False)
    for language, title, text in BLOCKS:
        if title and language == "diff":
            (copy / title).write_text(applied(text, (copy / title).read_text(encoding="utf-8")), encoding="utf-8")
        elif title:
            assert not (copy / title).exists(), f"{title} is there already"
            (copy / title).write_text(text, encoding="utf-8")
    return copy


def applied(diff: str, text: str) -> str:
    """A text with the added lines of a diff, each behind the line that stands before it in the diff."""
    lines, before = text.splitlines(), None
    for line in diff.splitlines():
        sign, content = line[:1], line[1:]
        if content.strip() == "...":
            continue
        if sign == "+":
            lines.insert(lines.index(before) + 1, content)
        else:
            assert content in lines, f"no line {content!r}"
        before = content
    return "\n".join(lines) + "\n"


def output_of(command: str, checkout: Path) -> str:
    """What a command of the page prints, with the copy's own raylift."""
    words = shlex.split(command)
    start = {"raylift": [sys.executable, "-m", "raylift"], "python": [sys.executable]}[words[0]]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "COLUMNS": "200"}
    done = subprocess.run(
        [*start, *words[1:]], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def command(beginning: str) -> str:
    """The one command of the page that begins so."""
    commands = [line for language, _, text in BLOCKS if language == "bash" for line in text.splitlines()]
    (found,) = [line for line in commands if line.startswith(beginning)]
    return found


def test_the_page_makes_a_file_a_line_in_the_dictionary_and_a_search_space():
    changed = {title: (language, text) for language, title, text in BLOCKS if title}
    assert set(changed) == {"models/systems/example_net.py", "models/zoo.py", "tune_spaces/example_net.yaml"}
    language, text = changed["models/zoo.py"]
    assert language == "diff"
    assert len([line for line in text.splitlines() if line.startswith("+")]) == 2


def test_the_list_of_systems_has_the_new_one(checkout):
    listed = output_of(command("raylift systems"), checkout)
    assert re.search(
        r"│ ExampleNet +│ example-net +│ regression +│ 2 +│ 128\^3, 2\.5 mm +│ [\d,]+ +│ Doe et al\. 2025", listed
    )
    for preset in ("example-net ", "example-net-slim ", "example-net-tiny "):
        assert f"    {preset}" in listed


def test_its_slim_preset_makes_a_run_that_fits(checkout):
    printed = output_of(command("raylift train"), checkout)
    assert "name: example-net\n" in printed
    assert "total per worker:" in printed


def test_the_parametrized_tests_find_it_and_pass(checkout):
    summary = output_of(command("python -m pytest") + " -p no:cacheprovider", checkout).splitlines()[-1]
    (passed,) = re.findall(r"^(\d+) passed", summary)
    assert int(passed) >= 15, summary


def test_the_code_of_the_page_is_formatted_as_the_repositorys(checkout):
    for tool in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        words = [sys.executable, "-m", "ruff", *tool, "models"]
        done = subprocess.run(words, cwd=checkout, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
