"""Searches on real Ray Tune: spaces are checked first, trials are Ray Train runs, a killed search resumes."""

import builtins
import contextlib
import html
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray import tune
from ray.experimental import tqdm_ray

from raylift.datasets.archive.store import Folder
from raylift.datasets.errors import ConfigError
from raylift.datasets.serialization import to_plain
from raylift.models import weights
from raylift.platform import cli, cluster
from raylift.platform.commands.run_arguments import parse
from raylift.platform.commands.train import TrainOptions
from raylift.platform.config import override
from raylift.platform.presets import PRESETS, train_command
from raylift.platform.training import lease
from raylift.platform.training.checkpoint import Checkpoints
from raylift.platform.tuning import search, search_report, trials
from raylift.platform.tuning.algorithms import SAMPLERS, FeasibleSearch
from raylift.platform.tuning.search import Search, Space
from raylift.platform.tuning.study import TrialHistory, as_study

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


def test_of_equal_trials_the_one_that_started_first_is_the_best():
    started = [trials.Trial(name, {}, psnr, 4, "") for name, psnr in (("c", 20.0), ("b", 21.0), ("a", 21.0))]
    assert [trial.id for trial in sorted(started, key=trials._rank)] == ["b", "a", "c"]


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


@dataclass(frozen=True)
class Searched:
    """A search of which some trials failed, with what it returned and printed."""

    url: str
    table: list[trials.Trial]
    lines: list[str]


@pytest.fixture(scope="module")
def searched(tiny, ray_cluster, tmp_path_factory) -> Searched:
    url, output = str(tmp_path_factory.mktemp("searches") / "search"), io.StringIO()
    run = replace(
        tiny,
        cluster=replace(tiny.cluster, workers=1),
        train=replace(tiny.train, steps=2, validate_every=1, validation_samples=1),
    )
    space = Space({"optimizer.lr": {"choice": [1e30, 2e-4]}, "system.loss.mse_weight": {"uniform": [1.0, 2.0]}})
    search.create(Search(run, space, trials=4, sampler="random", scheduler="median"), url)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        # As Ray does in the driver's process; whatever holds the replaced function cannot be pickled.
        patch.setattr(builtins, "print", tqdm_ray.safe_print)
        table = search.fit(url)
    return Searched(url, table, output.getvalue().splitlines())


def test_a_trial_that_fails_is_reported_once_in_a_sentence_and_the_search_continues(searched):
    table = searched.table
    failed = [trial for trial in table if trial.settings["optimizer.lr"] == 1e30]
    assert 0 < len(failed) < len(table) == 4
    named = r"tune: trial \w+ failed: the (generator|discriminator)'s loss at step [12] is nan on samples .+ is valid"
    assert [bool(re.fullmatch(named, line)) for line in searched.lines].count(True) == len(failed)
    assert all("'s loss at step" in trial.error for trial in failed)
    assert all(trial.error == "" for trial in table if trial not in failed)
    assert table[0].best_psnr_db is not None
    assert not Path(searched.url, "trials.json").exists()


def test_the_report_has_every_trial_and_each_of_its_commands_trains_the_trial_again(searched, tmp_path, capsys):
    assert cli.main(["tune", "--report", searched.url]) == 0
    assert capsys.readouterr().out == f"report: {searched.url}/report.html\n"
    page = html.unescape(Path(searched.url, "report.html").read_text())
    failed = [trial for trial in searched.table if trial.error]
    assert f"{len(failed)} of 4 trials failed: raylift tune --resume {searched.url} repeats them." in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|https?://|@import""", page)
    figures = ["Optimization history", "Learning curves", "Importance of settings", "Parallel coordinates"]
    assert re.findall(r'<img alt="(.+?)"', page) == figures
    commands = dict(re.findall(r"<h3>(\w+)</h3>\n<pre>(raylift .+)</pre>", page))
    assert commands.keys() == {trial.id for trial in searched.table}
    for trial in searched.table:
        row = re.search(rf"<tr><td>{trial.id}</td>(.+?)</tr>", page, re.DOTALL)[1]
        assert f"failed: {trial.error}" in row if trial.error else f"<td>{trial.best_psnr_db:.2f}</td>" in row

    best = searched.table[0]
    again = str(tmp_path / "again")
    assert cli.main([*shlex.split(commands[best.id])[1:], "--output", again]) == 0
    digests = [
        {
            name: digest
            for name, digest in Checkpoints(url).published()[-1][1]["sha256"].items()
            if name.endswith(".safetensors")
        }
        for url in (again, f"{searched.url}/trials/{best.id}")
    ]
    assert len(digests[0]) > 2
    assert digests[0] == digests[1]


def test_the_report_has_a_storage_that_optuna_opens(searched):
    search_report.write(searched.url)
    storage = JournalStorage(JournalFileBackend(f"{searched.url}/optuna.log"))
    by_id = {trial.user_attrs["id"]: trial for trial in optuna.load_study(study_name="search", storage=storage).trials}
    assert by_id.keys() == {trial.id for trial in searched.table}
    for trial in searched.table:
        stored = by_id[trial.id]
        assert stored.params == trial.settings
        if trial.error:
            assert stored.state == TrialState.FAIL
        else:
            assert stored.state in (TrialState.COMPLETE, TrialState.PRUNED)
            assert stored.value == trial.best_psnr_db == max(stored.intermediate_values.values())
            assert stored.state == TrialState.PRUNED or list(stored.intermediate_values) == [1, 2]


def test_a_report_states_whether_its_search_runs_or_was_interrupted(tiny, s3_bucket_url, tmp_path):
    for url in (str(tmp_path / "search"), f"{s3_bucket_url}/reported-search"):
        search.create(Search(tiny, SPACE), url)
        with lease.acquire(url):
            search_report.write(url)
            assert "The search is running" in Folder(url).read("report.html").decode()
        search_report.write(url)
        page = Folder(url).read("report.html").decode()
        assert "0 of 8 trials: none has started." in page
        assert f"The search was interrupted: raylift tune --resume {url} resumes it." in page
        assert "There are no figures" in page


def test_a_trial_that_was_stopped_early_is_pruned_in_optuna(tiny):
    space = Space({"optimizer.lr": {"log_uniform": [1e-4, 1e-2]}})
    states = {"finished": {1: 20.0, 2: 21.0}, "stopped early": {1: 19.0}, "failed": {1: 18.0}, "unfinished": {}}
    histories = [
        TrialHistory(state, tiny, {"optimizer.lr": 1e-3}, state, validations) for state, validations in states.items()
    ]
    stored = as_study(Search(tiny, space), histories).trials
    assert [trial.state.name for trial in stored] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING"]
    assert [trial.value for trial in stored] == [21.0, 19.0, None, None]
    assert [trial.intermediate_values for trial in stored] == list(states.values())


@pytest.mark.parametrize("path", sorted(search.spaces_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_the_command_of_a_trial_has_its_settings_for_every_space(path):
    space = search.load_space(path.stem)
    for end in (0, -1):
        values = {key: next(iter(how.values()))[end] for key, how in space.space.items()}
        run = override(PRESETS[space.preset], {**values, "data.archive": "a folder", "train.steps": 7})
        _, _, preset, *options = shlex.split(train_command(run))
        assert parse("train", options, TrainOptions(PRESETS[preset])).run == run


def test_a_report_of_no_search_is_refused(tmp_path, capsys):
    assert cli.main(["tune", "--report", str(tmp_path)]) == 2
    assert "is not a search: it has no search.json" in capsys.readouterr().err
    assert cli.main(["tune", "--report", str(tmp_path), "--trials", "3"]) == 2
    assert "--report takes a search alone: leave out --trials 3" in capsys.readouterr().err


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
    fresh = [str(space), "--preset", str(run), "--trials", "3", "--max-concurrent-trials", "1", "--output", str(url)]
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
    search.create(Search(small, SPACE, trials=3, max_concurrent_trials=1), unbroken)
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


def feasible(run, patches):
    proposals = FeasibleSearch(run, SAMPLERS["tpe"](0))
    proposals.set_search_properties("val_psnr_db", "max", {"system.denoiser.patch": tune.choice(patches)})
    return proposals


@pytest.fixture(scope="module")
def denoising(tiny):
    """A run whose network at 32^3 needs patches that divide 32."""
    return replace(PRESETS["diffux2ct-tiny"], data=tiny.data)


def test_a_proposal_that_makes_no_network_is_refused_before_a_trial_starts_and_pruned_in_the_sampler(denoising, capsys):
    proposals = feasible(denoising, [2, 3])
    assert [proposals.suggest(f"{k}") for k in range(6)] == [{"system.denoiser.patch": 2}] * 6
    refused = [line for line in capsys.readouterr().out.splitlines() if "refused" in line]
    assert refused
    assert all(line.startswith("tune: refused {'system.denoiser.patch': 3}: ") for line in refused)
    assert states(proposals) == [(2, "RUNNING")] * 6 + [(3, "FAIL")] * len(refused)

    proposals.on_trial_complete("0", {"val_psnr_db": 20.0})
    later = 0
    while not later:
        assert proposals.suggest(f"{len(states(proposals))}") == {"system.denoiser.patch": 2}
        later = sum("refused" in line for line in capsys.readouterr().out.splitlines())
    assert states(proposals).count((3, "FAIL")) == len(refused)
    assert states(proposals).count((3, "PRUNED")) == later


def states(proposals):
    return sorted((trial.params["system.denoiser.patch"], trial.state.name) for trial in proposals._ot_study.trials)


def test_a_search_in_which_no_further_network_is_proposed_keeps_its_trials(denoising, monkeypatch, capsys):
    proposals = feasible(denoising, [2, 3])
    assert proposals.suggest("a") == {"system.denoiser.patch": 2}
    monkeypatch.setattr(
        proposals,
        "_run",
        replace(
            denoising,
            system=replace(
                denoising.system,
                denoiser=replace(denoising.system.denoiser, channels=(16,) * 7, attention_levels=(False,) * 7),
            ),
        ),
    )
    assert proposals.suggest("b") == proposals.FINISHED
    assert "tune: no further trial starts: 100 proposals in a row make no network" in capsys.readouterr().out


def test_a_space_without_a_network_ends_the_search_in_a_sentence(denoising, ray_cluster, tmp_path):
    space, url = Space({"system.denoiser.patch": {"choice": [3, 5]}}), str(tmp_path / "search")
    search.create(Search(replace(denoising, cluster=replace(denoising.cluster, workers=1)), space), url)
    with pytest.raises(ConfigError, match="100 proposals in a row make no network, the last because"):
        search.fit(url)
    assert not list((tmp_path / "search").glob("trials/*"))
