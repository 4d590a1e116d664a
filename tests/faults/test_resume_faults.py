"""Resuming with other inputs: what a run began with is kept, taken with a line, or refused with the difference."""

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.store import Folder
from raylift.datasets.errors import ArchiveError, ConfigError
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.ingest.synthetic import ingest_phantoms
from raylift.datasets.streaming.order import BatchPartition
from raylift.platform import cli
from raylift.platform.config import RunConfig
from raylift.platform.training import inputs, resuming, runs

GRID = Grid(32, 10.0)
SHARE = BatchPartition(0, 1, 4, 1)


@pytest.fixture
def own(tiny, archive32, tmp_path) -> RunConfig:
    """The tiny run on an archive of its own."""
    archive = shutil.copytree(archive32, tmp_path / "archive")
    return replace(tiny, data=replace(tiny.data, archive=str(archive)))


def grow(run: RunConfig, times: int = 1) -> None:
    """New snapshots of the archive, each with a sample."""
    for seed in range(times):
        ingest_phantoms(run.data.archive, GRID, chest(GRID), count=1, seed=1000 + seed)


def ids(run: RunConfig) -> list[tuple[str, ...]]:
    """The samples of a run's first batches."""
    archive = Archive(run.data.archive, run.data.snapshot)
    stream = inputs.open_stream(archive, run, inputs.describe(run, archive), SHARE)
    return [batch.ids for batches in islice(iter(stream), 5) for batch in batches]


def test_a_run_keeps_its_snapshot_while_the_archive_grows_beyond_the_manifests_that_are_kept(own, tmp_path, capsys):
    url = str(tmp_path / "run")
    run = runs.create(own, url)
    before, snapshot = ids(run), run.data.snapshot
    grow(run, 6)
    assert f"{snapshot:06d}.json" not in Folder(run.data.archive).names("manifests")
    assert ids(own) != before, "the archive did not grow"
    again = resuming.resume_run(runs.load_run(url), url)
    assert again == run
    assert ids(again) == before
    assert inputs.describe(again, Archive(own.data.archive, snapshot)).provenance["archive_snapshot"] == snapshot
    assert "raylift: " not in capsys.readouterr().out

    moved = resuming.resume_run(replace(run, data=replace(run.data, snapshot="latest")), url)
    assert moved.data.snapshot == snapshot + 6
    assert f"data.snapshot changes from {snapshot} to {snapshot + 6}" in capsys.readouterr().out
    assert ids(moved) == ids(own)
    assert runs.load_run(url) == moved
    inputs.require_archives(moved, runs.load_record(url)["archives"])


def test_a_worker_whose_archive_holds_other_samples_stops(own, tmp_path):
    run = runs.create(own, str(tmp_path / "run"))
    shutil.rmtree(own.data.archive)
    ingest_phantoms(own.data.archive, GRID, chest(GRID), count=12, seed=2, samples_per_shard=5)
    assert Archive(own.data.archive).manifest.snapshot == run.data.snapshot
    with pytest.raises(ConfigError, match=r"does not hold the samples that this run began with \(snapshot 3"):
        runs.fit(run, str(tmp_path / "run"))


def test_a_snapshot_that_an_archive_does_not_have_is_refused_with_its_newest(archive32):
    with pytest.raises(ArchiveError, match=r"has no snapshot 9, its newest is 3.*--data\.snapshot latest"):
        Archive(str(archive32), 9)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--train.batch-size", "8"], "train.batch_size 4, not 8"),
        (["--train.seed", "1"], "train.seed 0, not 1"),
        (["--data.window.high-hu", "400"], "data.window.high_hu 1476.0, not 400.0"),
        (["--system.loss.mse_weight", "0"], "system.loss.mse_weight 10.0, not 0.0"),
        (["--system.loss.l1_weight", "3"], "system.loss.l1_weight 0.0, not 3.0"),
        (["--system.loss.cone_jitter_deg", "3"], "system.loss.cone_jitter_deg 10.0, not 3.0"),
        (["--train.steps", "16", "--train.seed", "1"], "train.seed 0, not 1"),
    ],
)
def test_a_setting_that_a_resumed_run_keeps_is_refused_by_name(own, tmp_path, words, named, capsys):
    url = str(tmp_path / "run")
    runs.create(own, url)
    record = (tmp_path / "run/run.json").read_bytes()
    assert cli.main(["train", "--resume", url, *words]) == 2
    output = capsys.readouterr()
    assert f"{url} keeps {named}: start a new run to change it" in output.err
    assert output.out == ""
    assert (tmp_path / "run/run.json").read_bytes() == record


def test_settings_that_are_meant_to_change_are_printed_and_recorded(own, tmp_path, capsys):
    url = str(tmp_path / "run")
    run = runs.create(own, url)
    changed = replace(
        run,
        train=replace(run.train, steps=16),
        cluster=replace(run.cluster, workers=1),
        engine=replace(run.engine, zero_stage=3, precision="bf16"),
        system=replace(run.system, loss=replace(run.system.loss, mse_weight=3.0)),
    )
    assert resuming.resume_run(changed, url) == changed
    assert capsys.readouterr().out.splitlines() == [
        "raylift: system.loss.mse_weight changes from 10.0 to 3.0",
        "raylift: engine.zero_stage changes from 1 to 3",
        "raylift: engine.precision changes from fp32 to bf16",
        "raylift: cluster.workers changes from 2 to 1",
        "raylift: train.steps changes from 8 to 16",
    ]
    assert runs.load_run(url) == changed
    assert resuming.resume_run(changed, url) == changed
    assert capsys.readouterr().out == ""


def test_another_archive_is_refused_and_a_copy_of_the_same_is_taken_with_a_line(own, tmp_path, capsys):
    url = str(tmp_path / "run")
    run = runs.create(own, url)
    other, copy = tmp_path / "other", Path(shutil.copytree(own.data.archive, tmp_path / "copy"))
    ingest_phantoms(str(other), GRID, chest(GRID), count=12, seed=2, samples_per_shard=5)
    with pytest.raises(ConfigError, match=r"keeps data\.archive '.*/archive', not '.*/other'"):
        resuming.resume_run(replace(run, data=replace(run.data, archive=str(other))), url)
    shutil.rmtree(own.data.archive)
    moved = resuming.resume_run(replace(run, data=replace(run.data, archive=str(copy))), url)
    assert f"data.archive changes from {own.data.archive} to {copy}" in capsys.readouterr().out
    assert runs.load_run(url).data.archive == moved.data.archive == str(copy)


def test_a_missing_record_is_written_again(finished_run, tmp_path, capsys):
    url = tmp_path / "run"
    shutil.copytree(finished_run, url)
    before = runs.load_run(str(url))
    (url / "run.json").unlink()
    assert resuming.resume_run(runs.load_run(str(url)), str(url)) == before
    assert "run.json is missing" in capsys.readouterr().out
    assert runs.load_run(str(url)) == before
