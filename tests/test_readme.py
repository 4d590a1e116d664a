"""README's commands, made small, run in their order, and so does the Python of the API page on what they made."""

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from raylift.datasets.archive.archive import Archive
from raylift.datasets.geometry import Grid
from raylift.datasets.phantom.thorax import thorax
from raylift.platform import cli

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PYTHON_PAGE = (REPOSITORY / "docs/reference/api/index.md").read_text(encoding="utf-8")
PAGES = [*REPOSITORY.glob("*.md"), *sorted((REPOSITORY / "docs").rglob("*.md"))]
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("raylift ")
]
SMALLER = {"64": "32", "5": "10", "x2ct-gan-slim": "x2ct-gan-tiny"}
FEWER = {
    "ingest": ["--split-fractions", "0.5", "0.25", "0.25"],
    "train": ["--train.steps", "4", "--train.validate-every", "4"],
    "tune": [
        *("--preset", "x2ct-gan-tiny", "--trials", "2", "--train.steps", "2", "--train.validate-every", "1"),
        *("--cluster.workers", "1"),
    ],
}


def small(words: list[str]) -> list[str]:
    words = [SMALLER.get(word, word) for word in words]
    extra = FEWER.get(words[0], [])
    for flag in ("--trials",):
        if flag in extra and flag in words:
            place = words.index(flag)
            del words[place : place + 2]
    return words + extra


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with CT files and radiographs, as a reader would have one."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "scans").mkdir()
    for seed in range(8):
        hu = thorax(seed, Grid(32, 10.0))[0]
        image = sitk.GetImageFromArray(hu.astype(np.int16))
        image.SetSpacing((10.0, 10.0, 10.0))
        image.SetDirection((1, 0, 0, 0, 1, 0, 0, 0, -1))
        sitk.WriteImage(image, str(folder / f"scans/subject-{seed}.nii.gz"))
        for name in ("pa", "lateral"):
            flat = hu.astype(float).mean(axis=1 if name == "pa" else 2)
            Image.fromarray(np.uint8(255 * (flat - flat.min()) / np.ptp(flat))).resize((96, 96)).save(
                folder / f"{name}.png"
            )
    return folder


@pytest.fixture(scope="module")
def commanded(place, ray_cluster):
    """The folder after every command of the README but the last, which serves until it is stopped."""
    *before, last = COMMANDS
    assert last[0] == "serve"  # tests/serve has it
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for words in before:
            assert cli.main(small(words)) == 0, words
    return place


def test_the_commands_of_the_readme_do_what_it_states_in_their_order(commanded, monkeypatch):
    monkeypatch.chdir(commanded)
    names = [
        "models",
        "reconstruct",
        "reconstruct",
        "doctor",
        "ingest",
        "train",
        "tune",
        "evaluate",
        "export",
        "reconstruct",
        "serve",
    ]
    assert [words[0] for words in COMMANDS] == names
    assert len(Archive("data/chest").entries()) == 8
    assert "PSNR" in Path("runs/first-report/report.html").read_text()
    assert Path("models/first/model.safetensors").is_file()
    volume = sitk.ReadImage("volume.nii.gz")
    assert volume.GetSize() == (32, 32, 32)
    assert volume.GetSpacing() == pytest.approx((10.0, 10.0, 10.0))


def test_the_python_of_the_api_page_runs_on_what_the_readme_made(commanded, monkeypatch):
    monkeypatch.chdir(commanded)
    (block,) = re.findall(r"```python\n(.*?)```", PYTHON_PAGE, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, "docs/reference/api/index.md", "exec"), names)
    assert tuple(names["volume"].shape) == (1, 1, 32, 32, 32)
    assert tuple(names["drr"].shape) == (1, 1, 32, 32)


def test_an_archive_is_read_without_raylift_as_its_page_shows(commanded, monkeypatch):
    monkeypatch.chdir(commanded)
    page = (REPOSITORY / "docs/reference/archive-format.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, "docs/reference/archive-format.md", "exec"), names)
    entry = Archive("data/chest").entries()
    (same,) = (one for one in entry if one.id == names["entry"]["id"])
    assert np.array_equal(names["volume_hu"], Archive("data/chest").read(same).volume)


def test_the_table_of_commands_has_every_command_and_no_other():
    named = re.findall(r"^\| `raylift ([\w -]+)`", README, re.MULTILINE)
    assert named == list(cli.COMMANDS)


def test_every_figure_that_a_page_quotes_stands_in_a_result():
    results = [REPOSITORY / "docs/results.md", *(REPOSITORY / "benchmarks/results").glob("*.md")]
    written = "\n".join(path.read_text(encoding="utf-8") for path in results)
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    quoted = [line for page in pages for line in re.findall(r"^> (.+)$", page, re.MULTILINE)]
    assert len(quoted) >= 4
    for line in quoted:
        assert line in written, line


def test_every_link_of_the_documents_leads_somewhere():
    generated = {"commands.md", "settings.md", "presets.md", "search-spaces.md", "tutorial.md"}
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            there = (page.parent / target).exists() or Path(target).name in generated
            assert there, f"{page.name} links to {target}"


def test_the_tree_of_the_readme_names_every_folder_of_the_repository():
    tree = README.split("## The tree")[1].split("```")[1]
    named = {line.split("/")[0] for line in tree.strip().splitlines() if not line.startswith(" ") and "/" in line}
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    tracked = {name.split("/")[0] for name in listed.splitlines() if "/" in name and not name.startswith(".")}
    assert named == tracked
