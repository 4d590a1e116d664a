"""Searches on real Ray Tune: spaces are checked first, trials are Ray Train runs, a killed search resumes."""

import builtins
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from ray.experimental import tqdm_ray

from raylift.datasets.errors import ConfigError
from raylift.datasets.serialization import to_plain
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
        (
            {"system.fusion.kind": {"choice": ["average", "max"]}},
            "expected one of average, sum, concatenate, attention, alignment, not 'max'",
        ),
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
    with pytest.raises(cluster.ClusterTooSmallError, match="a trial needs 50 CPUs"):
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
        (["--scheduler", "median"], "keeps scheduler 'asha', not 'median': start a new search"),
        (["--sampler", "random"], "keeps sampler 'tpe', not 'random': start a new search"),
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
    search.resume_search(changed, url)
    assert capsys.readouterr().out == "raylift: run.cluster.workers changes from 2 to 1\n"
    assert search.load_search(url) == changed
    search.resume_search(changed, url)
    assert capsys.readouterr().out == ""


def test_a_trial_that_fails_is_reported_once_in_a_sentence_and_the_search_continues(
    tiny, ray_cluster, tmp_path, monkeypatch, capsys
):
    # As Ray does in the driver's process; whatever holds the replaced function cannot be pickled.
    monkeypatch.setattr(builtins, "print", tqdm_ray.safe_print)
    url = str(tmp_path / "search")
    run = replace(
        tiny,
        cluster=replace(tiny.cluster, workers=1),
        train=replace(tiny.train, steps=2, validate_every=2, validation_samples=1),
    )
    search.create(Search(run, Space({"optimizer.lr": {"choice": [1e30, 2e-4]}}), trials=3), url)
    table = search.fit(url)
    lines = capsys.readouterr().out.splitlines()
    failed = [trial for trial in table if trial.settings["optimizer.lr"] == 1e30]
    assert 0 < len(failed) < len(table) == 3
    named = r"tune: trial \w+ failed: the (generator|discriminator)'s loss at step 1 is nan on samples .+ is valid"
    assert [bool(re.fullmatch(named, line)) for line in lines].count(True) == len(failed)
    assert all("'s loss at step 1 is" in trial.error and trial.best_psnr_db is None for trial in failed)
    assert all(trial.error == "" for trial in table if trial not in failed)
    assert table[0].best_psnr_db is not None
    assert not (tmp_path / "search/trials.json").exists()


def test_a_search_that_is_interrupted_and_then_killed_ends_as_an_unbroken_one_and_repeats_no_trial(
    tiny, ray_cluster, tmp_path
):
    url, space, run = tmp_path / "search", tmp_path / "space.yaml", tmp_path / "run.yaml"
    space.write_text(yaml.safe_dump(to_plain(SPACE), sort_keys=False))
    small = replace(
        tiny,
        cluster=replace(tiny.cluster, workers=1),
        train=replace(tiny.train, steps=4, validate_every=2, validation_samples=2),
    )
    run.write_text(small.to_yaml())
    command = [sys.executable, "-m", "raylift", "tune"]
    fresh = [str(space), "--preset", str(run), "--trials", "3", "--max-concurrent", "1", "--output", str(url)]
    # A cluster of its own, which ends with the search that is killed.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    pipes = {"env": environment, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([*command, *fresh], **pipes) as first:
        wait_for_trials(url, first, 1)
        first.send_signal(signal.SIGTERM)
        _, errors = first.communicate(timeout=60)
    assert first.returncode == 130
    last = errors.splitlines()[-1]
    assert last == f"raylift: interrupted by SIGTERM; resume with raylift tune --resume {url}", errors
    with subprocess.Popen([*command, "--resume", str(url)], **pipes) as second:
        wait_for_trials(url, second, 2)
        os.killpg(second.pid, signal.SIGKILL)
    assert not (url / "trials.json").exists(), "the injection came too late"
    before = {path: path.stat().st_mtime_ns for path in url.glob("trials/*/checkpoints/*/model/*.safetensors")}
    assert before

    subprocess.run([*command, "--resume", str(url)], env=environment, check=True, timeout=400)
    assert {path: path.stat().st_mtime_ns for path in before if path.exists()} == before
    table = trials.load_table(str(url))
    assert len(table) == len(list(url.glob("trials/*"))) == 3, "a trial was repeated"
    assert len({str(trial.settings) for trial in table}) == 3
    metrics = [trial.best_psnr_db for trial in table]
    assert metrics == sorted(metrics, reverse=True)
    assert weights.load(table[0].checkpoint).description.grid.size == 32

    unbroken = str(tmp_path / "unbroken")
    search.create(Search(small, SPACE, trials=3, max_concurrent=1), unbroken)
    expected = search.fit(unbroken)
    results = [[(trial.settings, trial.best_psnr_db, trial.step) for trial in one] for one in (table, expected)]
    assert results[0] == results[1]


def wait_for_trials(url: Path, process: subprocess.Popen, count: int) -> None:
    """Wait until so many trials have begun and the newest has a checkpoint."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, "the search ended by itself"
        begun = sorted(url.glob("trials/*/run.json"), key=lambda path: path.stat().st_mtime_ns)
        if len(begun) >= count and list(begun[-1].parent.glob("checkpoints/*/checkpoint.json")):
            return
        time.sleep(0.05)
    raise AssertionError("too few trials began")
