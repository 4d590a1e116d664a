"""Searches on real Ray Tune: spaces are checked first, trials are Ray Train runs, a killed search resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from raylift.datasets.errors import ConfigError
from raylift.models import weights
from raylift.platform import cli, cluster
from raylift.platform.presets import PRESETS
from raylift.platform.tuning import search, trials
from raylift.platform.tuning.search import Search, Space

SPACE = Space(
    {
        "system.loss.mse_weight": {"log_uniform": [1.0, 100.0]},
        "system.fusion.kind": {"choice": ["average", "sum"]},
    }
)


@pytest.mark.parametrize("path", sorted(search.spaces_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_every_space_of_the_package_fits_its_preset(path):
    space = search.load_space(path.stem)
    assert space.preset in PRESETS
    assert search.validate(Search(PRESETS[space.preset], space)).keys() == space.space.keys()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"system.loss.mse_weigth": {"uniform": [0.0, 1.0]}}, "did you mean system.loss.mse_weight"),
        ({"system.fusion.kind": {"choice": ["average", "max"]}}, "max not in literal"),
        ({"optimizer.lr": {"uniform": [-1.0, 1.0]}}, "lr must be positive"),
        ({"optimizer.lr": {"uniform": [1.0]}}, r"takes \[low, high\]"),
        ({"optimizer.lr": {"uniform": [0.1, 1.0], "log_uniform": [0.1, 1.0]}}, "has 2 distributions"),
        ({"train.batch_size": {"integer": [4, 5]}}, "cannot be shared"),
    ],
)
def test_a_space_of_invalid_settings_is_refused_before_anything_starts(tiny, space, message):
    with pytest.raises(ConfigError, match=message):
        search.validate(Search(tiny, Space(space)))


def test_a_space_with_an_unknown_distribution_is_refused_by_its_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("space: {optimizer.lr: {lognormal: [0, 1]}}")
    with pytest.raises(ConfigError, match=r"lognormal.*mine\.yaml"):
        search.load_space(str(path))


def test_the_table_distinguishes_settings_with_the_same_last_part():
    keys = ("system.lifting.kind", "system.fusion.kind", "system.fusion.view_decoders", "optimizer.lr")
    trial = trials.Trial("t", dict.fromkeys(keys, 1), best_psnr_db=None, step=0, checkpoint="")
    headers = [str(column.header) for column in trials.as_table([trial]).columns]
    assert headers == ["trial", "lifting.kind", "fusion.kind", "view_decoders", "lr", "PSNR, dB", "step"]


def test_a_search_that_cannot_fit_states_it_at_once(tiny, ray_cluster, tmp_path):
    huge = replace(tiny, cluster=replace(tiny.cluster, workers=50), train=replace(tiny.train, batch_size=50))
    url = str(tmp_path / "huge")
    search.create(Search(huge, SPACE), url)
    began = time.monotonic()
    with pytest.raises(cluster.ClusterTooSmall, match="a trial needs 50 CPUs"):
        search.fit(url)
    assert time.monotonic() - began < 20


def test_a_search_that_cannot_fit_is_refused_before_its_file_is_written(tiny, ray_cluster, tmp_path, capsys):
    (tmp_path / "space.yaml").write_text("space: {system.loss.mse_weight: {uniform: [1.0, 2.0]}}")
    (tmp_path / "run.yaml").write_text(tiny.to_yaml())
    words = ["tune", str(tmp_path / "space.yaml"), "--preset", str(tmp_path / "run.yaml"), "--cluster.workers", "4"]
    assert cli.main([*words, "--output", str(tmp_path / "search")]) == 2
    assert "a trial needs 4 CPUs and this cluster has 2" in capsys.readouterr().err
    assert not (tmp_path / "search").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--trials", "9"], "keeps trials 8, not 9: start a new search"),
        (["--seed", "1", "--optimizer.lr", "1"], "keeps run.optimizer.lr 0.0002, not 1.0; seed 0, not 1: start"),
        (["--preset", "x2ct-gan-tiny"], "keeps its space and preset: leave out --preset"),
    ],
)
def test_an_option_that_a_resumed_search_keeps_is_refused_by_name(tiny, ray_cluster, tmp_path, words, named, capsys):
    url = str(tmp_path / "search")
    search.create(Search(tiny, SPACE), url)
    before = (tmp_path / "search/search.json").read_bytes()
    assert cli.main(["tune", "--resume", url, *words]) == 2
    assert named in capsys.readouterr().err
    assert (tmp_path / "search/search.json").read_bytes() == before


def test_resources_of_a_resumed_search_may_change_with_a_line(tiny, tmp_path, capsys):
    url = str(tmp_path / "search")
    search.create(Search(tiny, SPACE), url)
    saved = search.load_search(url)
    changed = replace(saved, run=replace(saved.run, cluster=replace(saved.run.cluster, workers=1)))
    search.resume(changed, url)
    assert capsys.readouterr().out == "raylift: run.cluster.workers changes from 2 to 1\n"
    assert search.load_search(url) == changed
    search.resume(changed, url)
    assert capsys.readouterr().out == ""


def test_a_killed_search_resumes_and_repeats_no_finished_trial(tiny, tmp_path):
    search = tmp_path / "search"
    space = tmp_path / "space.yaml"
    space.write_text(
        "space:\n  system.loss.mse_weight: {log_uniform: [1.0, 100.0]}\n"
        "  system.fusion.kind: {choice: [average, sum]}\n"
    )
    run = tmp_path / "run.yaml"
    run.write_text(replace(tiny, cluster=replace(tiny.cluster, workers=1)).to_yaml())
    command = [sys.executable, "-m", "raylift", "tune"]
    fresh = [str(space), "--preset", str(run), "--trials", "3", "--max-concurrent", "1", "--output", str(search)]
    # A cluster of its own, which ends with the search that is killed.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    first = subprocess.Popen([*command, *fresh], env=environment, start_new_session=True)
    finished = wait_for_trial(search, first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (search / "trials.json").exists(), "the injection came too late"
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}

    subprocess.run([*command, "--resume", str(search)], env=environment, check=True, timeout=400)
    table = json.loads((search / "trials.json").read_text())["trials"]
    assert len(table) == 3
    assert [trial["best_psnr_db"] for trial in table] == sorted(
        (trial["best_psnr_db"] for trial in table), reverse=True
    )
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == before
    assert len({json.dumps(trial["settings"], sort_keys=True) for trial in table}) == 3
    assert weights.load(table[0]["checkpoint"]).description.grid.size == 32


def wait_for_trial(search: Path, process: subprocess.Popen) -> Path:
    """The folder of the first trial that came to its last step."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, "the search ended by itself"
        for done in search.glob("trials/*/checkpoints/step-00000008/checkpoint.json"):
            # Tune has not received it yet.
            time.sleep(5)
            return done.parents[2]
        time.sleep(0.2)
    raise AssertionError("no trial finished")
