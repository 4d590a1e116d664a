"""Searches of two objectives on real Ray Tune: quality against inference time, with the Pareto set."""

import html
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray import tune

from raylift.datasets.archive.archive import Archive
from raylift.datasets.errors import ConfigError
from raylift.platform import cli, model_store
from raylift.platform.evaluation.cases import read_ground_truth
from raylift.platform.evaluation.predictors import ModelPredictor
from raylift.platform.evaluation.protocols import PROTOCOLS
from raylift.platform.presets import PRESETS
from raylift.platform.tuning import search, search_report, two_objectives
from raylift.platform.tuning.algorithms import SAMPLERS, FeasibleSearch
from raylift.platform.tuning.search import Search, Space
from raylift.platform.tuning.study import TrialHistory, as_study
from raylift.platform.tuning.trials import Trial, _rank, load_table
from raylift.platform.tuning.two_objectives import Measurement, is_pareto_optimal, median_seconds

SPACE = "space:\n  optimizer.lr: {log_uniform: [1.0e-4, 1.0e-2]}\n  system.encoder.growth_rate: {choice: [4, 12]}\n"


@pytest.fixture(scope="module")
def searched(tiny, ray_cluster, tmp_path_factory):
    """The folder of a search of SSIM and time with what it printed."""
    folder = tmp_path_factory.mktemp("two-objectives")
    (folder / "space.yaml").write_text(SPACE)
    (folder / "run.yaml").write_text(tiny.to_yaml())
    words = ["--preset", str(folder / "run.yaml"), "--cluster.workers", "1", "--trials", "3", "--seed", "3"]
    words += ["--max-concurrent-trials", "1", "--objectives", "ssim-time", "--scheduler", "none"]
    words += ["--train.steps", "2", "--train.validate-every", "1", "--train.validation-samples", "2"]
    assert cli.main(["tune", str(folder / "space.yaml"), *words, "--output", str(folder / "search")]) == 0
    return folder / "search"


def test_the_pareto_set_of_a_search_is_in_its_table_and_in_the_storage_of_optuna(searched):
    table = load_table(str(searched))
    points = {trial.id: (trial.measurement.quality, trial.measurement.inference_s) for trial in table}
    assert len(set(points.values())) == 3
    front = {
        name
        for name, (quality, seconds) in points.items()
        if not any((q >= quality and s < seconds) or (q > quality and s <= seconds) for q, s in points.values())
    }
    assert {trial.id for trial in table if trial.pareto} == front
    rows = json.loads((searched / "trials.json").read_text())["trials"]
    assert {row["id"] for row in rows if row["pareto"]} == front
    ordered = [trial.measurement.inference_s for trial in table if trial.pareto]
    assert ordered == sorted(ordered, reverse=True)

    study = optuna.load_study(study_name="search", storage=JournalStorage(JournalFileBackend(f"{searched}/optuna.log")))
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert {trial.user_attrs["id"]: tuple(trial.values) for trial in study.trials} == points
    assert {trial.user_attrs["id"] for trial in study.best_trials} == front


def test_the_ssim_of_a_trial_is_that_of_an_evaluation_of_its_best_checkpoint(searched, tiny):
    archive, trial = Archive(tiny.data.archive), load_table(str(searched))[0]
    predictor = ModelPredictor("model", model_store.load(trial.checkpoint), None, 1, 0)
    values = []
    for entry in archive.entries("val")[:2]:
        outcome = predictor.predict(archive, entry, read_ground_truth(archive, entry))
        values.append(PROTOCOLS["volume"].evaluate(outcome.predictions["model"])["ssim"])
    assert trial.measurement.quality == pytest.approx(sum(values) / len(values), abs=1e-6)


def test_the_terminal_and_the_report_have_the_pareto_set_and_the_device(searched, capsys):
    table = load_table(str(searched))
    assert cli.main(["tune", "--resume", str(searched)]) == 0
    printed = capsys.readouterr().out
    (device,) = {trial.measurement.device for trial in table}
    assert device == two_objectives.device_name(torch.device("cpu")).rpartition(" ")[0] + " 1"
    assert printed.count(f"Pareto set, measured on {device}:\n") == 1
    for trial in table:
        line = f"  SSIM: {trial.measurement.quality:.4g}; inference time {trial.measurement.inference_s:.4g} s: "
        assert printed.count(f"{line}{trial.checkpoint}\n") == trial.pareto
    assert "best checkpoint" not in printed
    assert cli.main(["runs", str(searched)]) == 0
    front = [trial for trial in table if trial.pareto]
    assert f"finished  3 trials  {len(front)} trials in the Pareto set" in capsys.readouterr().out

    page = html.unescape((searched / "report.html").read_text())
    assert re.findall(r'<img alt="(.+?)"', page)[0] == "Pareto front"
    assert f"The Pareto set of SSIM and time has {len(front)} trials." in page
    assert device in page
    for trial in table:
        row = re.search(rf"<tr><td>{trial.id}</td>(.+?)</tr>", page, re.DOTALL)[1]
        cells = [f"{trial.measurement.quality:.4g}", f"{trial.measurement.inference_s:.4g}"]
        assert re.findall("<td>(.*?)</td>", row)[:3] == [*cells, "yes" if trial.pareto else "no"]


def test_a_trial_is_measured_once(searched, tiny):
    trial_url = str(searched / "trials" / load_table(str(searched))[0].id)
    written = Path(trial_url, two_objectives.MEASUREMENT_FILE).stat().st_mtime_ns
    assert two_objectives.measure(tiny, trial_url, "ssim-time") == load_table(str(searched))[0].measurement
    assert Path(trial_url, two_objectives.MEASUREMENT_FILE).stat().st_mtime_ns == written


def test_the_time_of_a_prediction_is_the_median_without_the_warm_up():
    durations = [0.3, 0.3, 0.02, 0.3, 0.04, 0.03, 0.05, 0.3, 0.03]
    left = iter(durations)
    seconds = median_seconds(lambda: time.sleep(next(left)), torch.device("cpu"))
    assert 0.04 <= seconds < 0.05
    assert next(left, None) is None


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_the_pareto_set_is_optunas(points):
    study = optuna.create_study(directions=["maximize", "minimize"])
    for point in points:
        study.add_trial(optuna.trial.create_trial(values=point))
    expected = {trial.number for trial in study.best_trials}
    assert is_pareto_optimal([*points, None]) == [*(index in expected for index in range(len(points))), False]


def test_a_scheduler_that_stops_trials_is_refused_with_two_objectives(tiny, tmp_path, capsys):
    (tmp_path / "space.yaml").write_text(SPACE)
    (tmp_path / "run.yaml").write_text(tiny.to_yaml())
    words = ["tune", str(tmp_path / "space.yaml"), "--preset", str(tmp_path / "run.yaml"), "--objectives", "psnr-time"]
    for scheduler in ([], ["--scheduler", "median"]):
        assert cli.main([*words, *scheduler, "--output", str(tmp_path / "search")]) == 2
        message = f"{scheduler[-1] if scheduler else 'asha'} stops trials early: give --scheduler none"
        assert message in capsys.readouterr().err
    assert not (tmp_path / "search").exists()


def test_ssim_is_refused_for_an_archive_of_radiographs(tiny, pairs_folder, tmp_path):
    archive = str(tmp_path / "pairs")
    assert cli.main(["ingest-xray", str(pairs_folder), "--archive", archive, "--size", "32", "--spacing-mm", "10"]) == 0
    run = replace(tiny, data=replace(tiny.data, archive=archive))
    space = Space({"optimizer.lr": {"uniform": [1e-4, 1e-3]}})
    with pytest.raises(ConfigError, match="radiographs alone: give --objectives psnr-time"):
        search.prepare(Search(run, space, scheduler="none", objectives="ssim-time"))


def test_optuna_gets_both_objectives_and_the_settings_that_make_no_network_as_pruned(tiny, capsys):
    run = replace(PRESETS["diffux2ct-tiny"], data=tiny.data)
    proposals = FeasibleSearch(run, SAMPLERS["tpe"](0), two_objectives=True)
    proposals.set_search_properties(None, None, {"system.denoiser.patch": tune.choice([2, 3])})
    assert proposals.suggest("0")
    proposals.on_trial_complete("0", {"quality": 0.5, "inference_s": 1.0})
    count = 1
    while len(proposals._ot_study.trials) < 30:
        assert proposals.suggest(str(count)) == {"system.denoiser.patch": 2}
        proposals.on_trial_complete(str(count), {"quality": 0.5 + count, "inference_s": 1.0 + count})
        count += 1
    stored = proposals._ot_study.trials
    complete = [trial for trial in stored if trial.state.name == "COMPLETE"]
    assert [trial.values for trial in complete[1:]] == [[0.5 + index, 1.0 + index] for index in range(1, count)]
    assert len(proposals._ot_study.best_trials) == count
    assert "PRUNED" in {trial.state.name for trial in stored if trial.params["system.denoiser.patch"] == 3}


def test_a_trial_that_is_trained_and_not_measured_yet_has_no_values(tiny):
    space = Space({"optimizer.lr": {"uniform": [1e-4, 1e-3]}})
    settings = {"optimizer.lr": 2e-4}
    histories = [
        TrialHistory("a", tiny, settings, "finished", {8: 20.0}, measurement=Measurement("SSIM", 0.5, 0.1, "cpu")),
        TrialHistory("b", tiny, settings, "unfinished", {8: 20.0}),
    ]
    study = as_study(Search(tiny, space, scheduler="none", objectives="ssim-time"), histories)
    assert [(trial.state.name, trial.values) for trial in study.trials] == [("COMPLETE", [0.5, 0.1]), ("RUNNING", None)]


def test_a_trial_without_a_measurement_ranks_last(tiny):
    space, measured = Space({"optimizer.lr": {"uniform": [1e-4, 1e-3]}}), [(0.4, 0.3), (0.6, 0.2), None, (0.5, 0.1)]
    measurements = [point and Measurement("SSIM", *point, "cpu") for point in measured]
    histories = [
        TrialHistory(name, tiny, {"optimizer.lr": 2e-4}, "finished" if one else "failed", {8: 20.0}, "", one)
        for name, one in zip("abcd", measurements, strict=True)
    ]
    two = Search(tiny, space, scheduler="none", objectives="ssim-time")
    rows = search_report._table(two, histories)[1]
    assert [(row[0], row[3]) for row in rows] == [("b", "yes"), ("d", "yes"), ("a", "no"), ("c", "no")]
    table = [
        Trial(name, {}, 20.0, 8, "", "", one, pareto=name in "bd")
        for name, one in zip("abcd", measurements, strict=True)
    ]
    assert [trial.id for trial in sorted(table, key=_rank)] == ["b", "d", "a", "c"]


def test_times_of_several_devices_are_marked():
    measurements = [Measurement("SSIM", 0.5, 0.1, device) for device in ("a", "b", "a")]
    assert two_objectives.devices(measurements) == "a; b: times on different devices are not comparable"
    assert two_objectives.devices([*measurements[:1], None]) == "a"
