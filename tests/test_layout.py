"""The layout: which folder imports which."""

import ast
import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raylift.platform.model_store import MODELS

REPOSITORY = Path(__file__).resolve().parents[1]
FLOW = ["datasets", "models", "platform", "serve"]
"""Data flows one way: a folder imports itself and the folders to its left."""
SERVE_MAY_IMPORT = {
    "raylift.platform.config",
    "raylift.platform.cluster",
    "raylift.platform.model_store",
    "raylift.platform.reports.page",
}

MODELS_MAY_IMPORT = {
    "batch",
    "choices",
    "hashed_json",
    "errors",
    "geometry",
    "intensity",
    "lung_segmenter",
    "phantom",
    "projector",
    "radiographs.histogram",
    "segmentation",
    "serialization",
}
"""Modules and folders of datasets/ that models/ needs: tensors and settings, and no archive, scan or image file."""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def modules(folder: str) -> list[Path]:
    return sorted((REPOSITORY / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", FLOW)
def test_a_folder_imports_only_itself_and_what_stands_to_its_left(folder):
    right = FLOW[FLOW.index(folder) + 1 :]
    for path in modules(folder):
        for name in imports(path):
            assert not name.startswith(tuple(f"raylift.{other}" for other in right)), f"{path} imports {name}"
            assert name.split(".")[0] not in {"models", "serve", "tune_spaces"}, f"{path} imports {name}"


def test_the_service_takes_the_configuration_and_the_cluster_and_never_the_training_loop():
    for path in modules("serve"):
        taken = {name for name in imports(path) if name.startswith("raylift.platform.")}
        assert all(any(name == m or name.startswith(f"{m}.") for m in SERVE_MAY_IMPORT) for name in taken), path


def graph() -> dict[str, set[str]]:
    """The modules of the five folders, each with every module that it imports; a package's module instead of a name."""
    paths = {}
    for folder in FLOW:
        for path in modules(folder):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            paths[".".join(["raylift", *parts]).removesuffix(".__init__")] = path
    found = {}
    for module, path in paths.items():
        names = imports(path)
        found[module] = {name for name in names if name in paths or not name.startswith("raylift.")}
    return found


def chain(imported: dict[str, set[str]], module: str, unwanted: set[str], visited: set[str]) -> list[str]:
    """Modules from one to an unwanted package, each imported by the one before; empty if there is no such chain."""
    visited.add(module)
    for name in sorted(imported.get(module, ())):
        if name.split(".")[0] in unwanted:
            return [module, name]
        if name in imported and name not in visited and (rest := chain(imported, name, unwanted, visited)):
            return [module, *rest]
    return []


def folder_of(module: str) -> str:
    """The folder inside one of the five, such as datasets.archive, or the module next to such folders."""
    return ".".join(module.split(".")[1:3])


def test_models_import_neither_storage_nor_ray_nor_deepspeed_however_indirectly():
    imported, unwanted = graph(), {"zarr", "fsspec", "s3fs", "ray", "deepspeed", "gradio"}
    assert chain(imported, "raylift.datasets.archive.archive", unwanted, set()), "the graph has no edges"
    for module in imported:
        if module.startswith("raylift.models."):
            assert not chain(imported, module, unwanted, set())


def test_models_take_from_datasets_only_what_is_listed_however_indirectly():
    imported = graph()
    reached = {module for module in imported if module.startswith("raylift.models.")}
    while new := {name for module in reached for name in imported[module] if name in imported} - reached:
        reached |= new
    taken = {module.removeprefix("raylift.datasets.") for module in reached if module.startswith("raylift.datasets.")}
    assert {"phantom" if name.startswith("phantom.") else name for name in taken} == MODELS_MAY_IMPORT


def test_folders_do_not_import_one_another_in_circles():
    imported = graph()
    folders: dict[str, set[str]] = {}
    for module, names in imported.items():
        inside = {folder_of(name) for name in names if name in imported}
        folders.setdefault(folder_of(module), set()).update(inside - {folder_of(module)})
    assert "datasets.geometry" in folders["models.parts"], "the graph has no edges"
    # What imports nothing that is left can be taken away; in a circle nothing can.
    while free := {folder for folder, names in folders.items() if not names & folders.keys()}:
        folders = {folder: names for folder, names in folders.items() if folder not in free}
    assert not folders, {folder: sorted(names & folders.keys()) for folder, names in folders.items()}


def test_reports_of_evaluation_and_search_share_their_templates_and_nothing_of_each_other():
    imported = graph()
    for room, other in (("tuning", "evaluation"), ("evaluation", "tuning")):
        names = {
            name for module in imported if module.startswith(f"raylift.platform.{room}.") for name in imported[module]
        }
        assert "raylift.platform.reports.page" in names
        assert not {name for name in names if name.startswith(f"raylift.platform.{other}.")}
    assert not chain(imported, "raylift.platform.reports.page", {"matplotlib", "torch", "ray"}, set())


def test_search_spaces_are_pure_data():
    assert {path.suffix for path in (REPOSITORY / "tune_spaces").iterdir() if path.name != "__pycache__"} == {".yaml"}


def test_no_module_is_named_like_a_standard_one():
    for folder in (*FLOW, "raylift"):
        for path in modules(folder):
            assert path.stem.startswith("__") or path.stem not in sys.stdlib_module_names, path


SAME_NAME = {"compare", "ptx", "runs", "score", "decoder"}
"""Modules that implement and offer one command, and the decoders of networks and of uploaded files."""


def stem_without_endings(path: Path) -> str:
    """Words of a module's name without plural and verbal endings: `pairing`, `paired` and `pairs` are equal."""
    return "_".join(re.sub(r"(?<=\w{4})(?:(?:at)?ion|ing|er|e?d|e?s|e|y)+$", "", word) for word in path.stem.split("_"))


def test_no_two_modules_have_one_name_or_names_that_differ_by_an_ending():
    assert stem_without_endings(Path("pairings.py")) == stem_without_endings(Path("paired.py"))
    named: dict[str, list[Path]] = {}
    for path in (path for folder in FLOW for path in modules(folder)):
        if not path.stem.startswith("__"):
            named.setdefault(stem_without_endings(path), []).append(path)
    repeated = {name: paths for name, paths in named.items() if len(paths) > 1}
    assert repeated.keys() == {stem_without_endings(Path(name)) for name in SAME_NAME}, repeated


def test_no_file_is_longer_than_the_limit():
    for folder in FLOW:
        for path in modules(folder):
            assert len(path.read_text().splitlines()) <= 350, path


def test_python_finds_its_own_platform_module_at_the_root():
    code = "import platform, numpy, raylift.platform.config; print(platform.system())"
    completed = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "Linux"


def test_the_code_runs_from_a_checkout_that_is_not_installed():
    # -S leaves out site-packages and with them the editable install; of what is imported nothing needs more.
    code = "import raylift, raylift.platform.cli as cli; raise SystemExit(cli.main(['--help']))"
    completed = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stderr
    assert "raylift COMMAND" in completed.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return path


def test_a_wheel_holds_exactly_the_tracked_files_of_the_six_folders(wheel):
    with zipfile.ZipFile(wheel) as opened:
        held = {name for name in opened.namelist() if ".dist-info/" not in name}
    folders = [*FLOW, "tune_spaces", "raylift"]
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    expected = {name if name.startswith("raylift/") else f"raylift/{name}" for name in tracked}
    assert held == expected


def test_a_wheel_holds_the_same_weights_once(wheel):
    with zipfile.ZipFile(wheel) as opened:
        names = [name for name in opened.namelist() if name.endswith(".safetensors")]
        digests = {hashlib.sha256(opened.read(name)).hexdigest() for name in names}
    assert len(names) == len(digests) >= 1
    assert len(names) < len(MODELS)


@pytest.mark.parametrize("views", [("frontal", "lateral"), ("frontal",)], ids=["two views", "frontal"])
def test_the_built_wheel_reconstructs_without_a_model_of_the_user(views, wheel, tmp_path):
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "installed")
    rows = np.linspace(0, 255, 96, dtype=np.uint8)
    for name in views:
        Image.fromarray(np.minimum.outer(rows, rows[::-1])).save(tmp_path / f"{name}.png")
    code = "import raylift; print(raylift.__file__); from raylift.platform import cli; raise SystemExit(cli.main())"
    words = ["reconstruct", *(word for view in views for word in (f"--{view}", f"{view}.png")), "-o", "ct.nii.gz"]
    completed = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.startswith(str(tmp_path / "installed/raylift"))
    assert (tmp_path / "ct.nii.gz").stat().st_size > 10_000


def test_type_checks_cover_all_five_folders():
    for folder in (*FLOW, "tune_spaces"):
        link = REPOSITORY / "typings/raylift" / folder
        assert link.is_symlink()
        assert link.resolve() == REPOSITORY / folder


def test_no_machine_path_stands_in_the_project():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split()
    marks = [f"/{name}/" for name in ("root", "opt")] + ["/wo" + "rk/"]
    for name in listed:
        path = REPOSITORY / name
        if path.is_file() and path.suffix in {".py", ".md", ".toml", ".yaml", ".txt", ""}:
            text = path.read_text(errors="ignore")
            assert not [mark for mark in marks if mark in text], name
