"""A file of a run, checkpoint, model or search with any byte changed or cut is refused by name, or another is used."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raylift.datasets import hashed_json
from raylift.datasets.archive.store import Folder
from raylift.datasets.errors import AlteredFileError, ConfigError, RayliftError
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.intensity import Window
from raylift.datasets.serialization import to_plain
from raylift.models import weights
from raylift.models.weights import Description
from raylift.platform import model_store
from raylift.platform.presets import PRESETS
from raylift.platform.training import runs
from raylift.platform.training.checkpoint import (
    RUN_FILE,
    CheckpointError,
    Checkpoints,
    Tensors,
    TrainingState,
    best_checkpoint,
    resolve_checkpoint,
)
from raylift.platform.tuning import search, two_objectives
from raylift.platform.tuning.search import SEARCH_FILE, Search, Space
from raylift.platform.tuning.trials import TABLE_FILE, Trial, load_table
from raylift.platform.tuning.two_objectives import MEASUREMENT_FILE, Measurement

GRID = Grid(32, 10.0)
RUN = PRESETS["x2ct-gan-tiny"]
PSNR_DB = {10: 20.0, 20: 23.0, 30: 21.0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run with three checkpoints, the second one best; and the files of a search."""
    url = tmp_path_factory.mktemp("whole") / "run"
    network = RUN.system.reconstruction_network(GRID, chest(GRID)).state_dict()
    tensors = Tensors({"generator": network}, {"generator": {"step": torch.tensor(1.0)}})
    description = Description(RUN.system, GRID, chest(GRID), Window())
    history = []
    for step, psnr in PSNR_DB.items():
        history.append({"step": float(step), "val_psnr_db": psnr})
        state = TrainingState(step, step, {"val_psnr_db": psnr}, list(history), to_plain(RUN), RUN.sha256())
        Checkpoints(str(url)).save(state, tensors, description)
    runs.write_record(str(url), RUN_FILE, {"config": to_plain(RUN)}, "run")
    search.runs.write_record(f"{url}/search", SEARCH_FILE, to_plain(Search(RUN, Space({}))), "search")
    table = [Trial("a", {}, 20.0, 10, "c")]
    Folder(f"{url}/search").write(TABLE_FILE, hashed_json.encode({"trials": to_plain(table)}))
    measurement = Measurement("SSIM", 0.5, 0.1, "cpu")
    Folder(f"{url}/search/trials/a").write(MEASUREMENT_FILE, hashed_json.encode(to_plain(measurement)))
    return url


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def damaged(content: bytes, position: int, bit: int, cut: bool) -> bytes:
    if cut:
        return content[:position]
    altered = bytearray(content)
    altered[position] ^= 1 << bit
    return bytes(altered)


READERS = {
    "checkpoints/step-00000020/model/model.json": lambda run: model_store.description_of(
        str(run / "checkpoints/step-00000020")
    ),
    "checkpoints/step-00000020/state.json": lambda run: runs.load_metrics(str(run / "checkpoints/step-00000020")),
    "run.json": lambda run: runs.load_run(str(run)),
    "search/search.json": lambda run: search.load_search(str(run / "search")),
    "search/trials.json": lambda run: load_table(str(run / "search")),
    "search/trials/a/objectives.json": lambda run: two_objectives.load(str(run / "search/trials/a")),
}


@pytest.mark.parametrize("name", READERS)
def test_every_flip_and_cut_of_a_json_file_is_detected(whole, name):
    content = (whole / name).read_bytes()
    assert hashed_json.decode(content, name)
    for position in range(len(content)):
        for altered in (damaged(content, position, position % 8, cut=False), content[:position]):
            with pytest.raises(AlteredFileError, match=name):
                hashed_json.decode(altered, name)
    with pytest.raises(AlteredFileError, match=name):
        hashed_json.decode(content + b" ", name)


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=12)
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7), st.booleans())
def test_what_reads_an_altered_file_refuses_it_by_name(whole, tmp_path_factory, name, place, bit, cut):
    run = Path(shutil.copytree(whole, tmp_path_factory.mktemp("altered") / "run"))
    content = (run / name).read_bytes()
    READERS[name](run)
    (run / name).write_bytes(damaged(content, int(place * len(content)), bit, cut))
    with pytest.raises(RayliftError, match=name) as refused:
        READERS[name](run)
    assert len(str(refused.value)) < 1000
    shutil.rmtree(run)


@settings(max_examples=40)
@given(
    st.sampled_from(["checkpoint.json", "state.json", "model/model.json", "model/model.safetensors"]),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 7),
    st.booleans(),
)
def test_with_any_byte_altered_another_checkpoint_is_resumed_from_or_best(
    whole, tmp_path_factory, file, place, bit, cut
):
    run = Path(shutil.copytree(whole, tmp_path_factory.mktemp("altered") / "run"))
    for step in (20, 30):
        path = run / f"checkpoints/step-000000{step}" / file
        content = path.read_bytes()
        path.write_bytes(damaged(content, int(place * len(content)), bit, cut))
    newest, rejected = Checkpoints(str(run)).newest()
    assert newest.endswith("step-00000010")
    assert [step in reason and file in reason for step, reason in zip(("30", "20"), rejected, strict=True)] == [
        True
    ] * 2
    url, summary = best_checkpoint(str(run))
    assert (url, summary["metrics"]["val_psnr_db"]) == (newest, 20.0)
    shutil.rmtree(run)


def test_the_best_checkpoint_passed_over_is_one_line_with_the_reason_and_the_replacement(run, capsys):
    assert resolve_checkpoint(str(run)).endswith("step-00000020")
    assert capsys.readouterr().out == ""
    path = run / "checkpoints/step-00000020/model/model.json"
    path.write_bytes(path.read_bytes().replace(b'"high_hu"', b'"high_hU"'))
    assert resolve_checkpoint(str(run)).endswith("step-00000030")
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{path} has SHA-256" in line
    assert line.endswith("step-00000030 is used instead")


def test_a_best_checkpoint_that_is_missing_is_named(run, capsys):
    shutil.rmtree(run / "checkpoints/step-00000020")
    assert resolve_checkpoint(str(run)).endswith("step-00000030")
    (line,) = capsys.readouterr().out.splitlines()
    assert "the best checkpoint" in line
    assert "step-00000020 (23.00), is missing" in line
    assert line.endswith("step-00000030 is used instead")


def test_a_renamed_checkpoint_is_none(run):
    (run / "checkpoints/step-00000020").rename(run / "checkpoints/step-00000040")
    newest, (reason,) = Checkpoints(str(run)).newest()
    assert newest.endswith("step-00000030")
    assert "is of step 20" in reason


def test_without_a_whole_checkpoint_every_reason_is_in_the_error(run):
    for path in run.rglob("model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"step-00000020.*step-00000030.*step-00000010"):
        best_checkpoint(str(run))


def test_an_edited_record_is_refused_with_the_setting_and_a_missing_one_is_made_up_for(run, capsys):
    record = run / RUN_FILE
    edited = record.read_bytes().replace(b'"batch_size": 4', b'"batch_size": 8')
    assert edited != record.read_bytes()
    record.write_bytes(edited)
    with pytest.raises(ConfigError, match=r"run\.json has SHA-256.*train\.batch_size 8, not 4.*Options of --resume"):
        runs.load_run(str(run))
    record.unlink()
    assert runs.load_run(str(run)) == RUN
    assert "run.json is missing: the settings in" in capsys.readouterr().out


def test_a_model_of_the_package_is_under_its_digest(tmp_path):
    folder = Path(shutil.copytree(model_store.package_folder("chest-64"), tmp_path / "model"))
    assert weights.load(folder)
    path = folder / "model.json"
    path.write_bytes(path.read_bytes().replace(b'"low_hu": -1024', b'"low_hu": -1025'))
    with pytest.raises(weights.WeightsError, match=r"model\.json has SHA-256.*Export the model again"):
        weights.load(folder)
