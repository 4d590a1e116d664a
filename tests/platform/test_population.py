"""Population-based training: who is replaced, by which settings, and a killed search that ends as an unbroken one."""

import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import yaml

from raylift.datasets import hashed_json
from raylift.datasets.archive.store import Folder
from raylift.datasets.errors import ConfigError
from raylift.datasets.serialization import to_plain
from raylift.platform import cli, run_list
from raylift.platform.training.checkpoint import CheckpointError, Checkpoints, best_checkpoint, load_state
from raylift.platform.tuning import population, search, search_report, trials
from raylift.platform.tuning.population import Member, Population
from raylift.platform.tuning.search import Search, Space

SPACE = Space(
    {
        "optimizer.lr": {"log_uniform": [1e-4, 1e-2]},
        "system.loss.mse_weight": {"uniform": [1.0, 100.0]},
        "system.loss.l1_weight": {"choice": [0.0, 1.0]},
        "system.fusion.kind": {"choice": ["average", "sum"]},
    }
)
DOMAINS = {"optimizer.lr": (1e-4, 1e-2), "system.loss.mse_weight": (1.0, 100.0)}


@pytest.fixture(scope="module")
def domains(tiny):
    return search.validate(Search(tiny, SPACE, scheduler="pbt"))


def settings_of(number):
    kind = "sum" if number % 2 else "average"
    return {
        "optimizer.lr": 1e-3 * (1 + number),
        "system.loss.mse_weight": 10.0 + number,
        "system.loss.l1_weight": float(number % 2),
        "system.fusion.kind": kind,
    }


def generation(size):
    members = {name: Member(name, settings_of(k)) for k, name in enumerate(f"{k:05d}" for k in range(size))}
    return Population(500, list(members), members)


@pytest.mark.parametrize(
    ("space", "options", "message"),
    [
        ({"system.fusion.kind": {"choice": ["average", "sum"]}}, {}, "a range .* of none: add optimizer.lr"),
        ({"system.loss.mse_weight": {"choice": [1.0, 2.0]}}, {}, "a range .* of none: add optimizer.lr"),
        ({"data.augmentation.volume.flip": {"uniform": [0.0, 0.5]}}, {}, "a range .* of none: add optimizer.lr"),
        (SPACE.space, {"trials": 1}, "needs a population of 2 trials or more: raise --trials"),
        (SPACE.space, {"steps": 4}, "train.validate_every 4 is not below train.steps 4: lower it"),
    ],
)
def test_a_search_in_which_no_setting_could_change_is_refused(tiny, space, options, message):
    run = replace(tiny, train=replace(tiny.train, steps=options.get("steps", 8)))
    described = {"trials": options.get("trials", 8), "scheduler": "pbt"}
    with pytest.raises(ConfigError, match=message):
        search.validate(Search(run, Space(space), **described))
    search.validate(Search(run, Space(space), scheduler="median"))


def test_members_of_the_best_quarter_replace_the_worst_quarter_with_other_rates_and_weights_alone(domains):
    before, parents = generation(8), set()
    scores = {f"{k:05d}": float(k) for k in range(8)}
    for seed in range(50):
        after = population._next_generation(before, scores, domains, np.random.default_rng(seed))
        assert after.living == ["00009", "00008", *before.living[2:]]
        assert list(after.members) == [*before.members, "00008", "00009"]
        for child in (after.members["00008"], after.members["00009"]):
            parent = before.members[child.parent]
            parents.add(parent.id)
            assert child.first_step == 500
            for key in ("system.loss.l1_weight", "system.fusion.kind"):
                assert child.settings[key] == parent.settings[key]
            for key, (low, high) in DOMAINS.items():
                assert low <= child.settings[key] <= high
    assert parents == {"00006", "00007"}


def test_a_setting_is_multiplied_by_0_8_or_1_2_or_sampled_anew_and_stays_in_its_range(domains):
    generator, ratios = np.random.default_rng(0), []
    for _ in range(400):
        changed = population._perturbed(settings_of(0), population._perturbable(domains), generator)
        assert changed.keys() == DOMAINS.keys()
        ratios.append(round(changed["optimizer.lr"] / 1e-3, 9))
    assert 0.3 < ratios.count(0.8) / 400 < 0.45
    assert 0.3 < ratios.count(1.2) / 400 < 0.45
    ends = {"optimizer.lr": 1e-2, "system.loss.mse_weight": 1.0}
    at_ends = [population._perturbed(ends, population._perturbable(domains), generator) for _ in range(100)]
    assert {key: all(low <= each[key] <= high for each in at_ends) for key, (low, high) in DOMAINS.items()} == {
        "optimizer.lr": True,
        "system.loss.mse_weight": True,
    }


def test_the_same_seed_and_step_make_the_same_generation_whatever_the_state_of_other_generators(domains):
    scores = {f"{k:05d}": float(k % 3) for k in range(8)}
    made = []
    for state in (1, 2):
        random.seed(state)
        np.random.seed(state)  # noqa: NPY002
        made.append(population._next_generation(generation(8), scores, domains, np.random.default_rng([7, 500])))
    assert made[0] == made[1]


def test_a_member_that_diverged_is_replaced_although_it_is_not_in_the_worst_quarter(domains):
    scores = {"00000": 3.0, "00001": 2.0, "00002": 1.0}
    after = population._next_generation(generation(8), scores, domains, np.random.default_rng(0))
    assert after.living[:3] == ["00000", "00001", "00002"]
    children = [after.members[name] for name in after.living[3:]]
    assert {child.parent for child in children} == {"00000", "00001"}


def test_a_lineage_has_the_settings_of_every_step():
    members = {
        "00000": Member("00000", {"optimizer.lr": 1e-3}),
        "00001": Member("00001", {"optimizer.lr": 2e-3}, "00000", 10),
        "00002": Member("00002", {"optimizer.lr": 3e-3}, "00001", 30),
    }
    lineage = Population(30, ["00000", "00002"], members).lineage("00002", 45)
    assert [(each.trial, each.first_step, each.last_step) for each in lineage] == [
        ("00000", 0, 10),
        ("00001", 10, 30),
        ("00002", 30, 45),
    ]
    assert [each.settings["optimizer.lr"] for each in lineage] == [1e-3, 2e-3, 3e-3]


def test_an_altered_state_of_a_population_is_refused_by_name(tmp_path):
    (tmp_path / "population.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"population\.json does not begin with file_sha256.*start a new search"):
        population.load(str(tmp_path))


def test_a_population_that_was_interrupted_is_listed_with_its_step(tiny, tmp_path):
    url = str(tmp_path / "search")
    search.create(replace(described(tiny), trials=8), url)
    assert [each.progress for each in run_list.overviews(url)] == ["0 of 2 steps of 8 members"]
    Folder(url).write("population.json", hashed_json.encode(to_plain(replace(generation(8), step=1))))
    (overview,) = run_list.overviews(url)
    assert (overview.progress, overview.command) == ("1 of 2 steps of 8 members", f"raylift tune --resume {url}")


def weights_of(url):
    return {name: digest for name, digest in newest(url)["sha256"].items() if name.endswith(".safetensors")}


def newest(url):
    return Checkpoints(str(url)).published()[-1][1]


def test_a_copied_checkpoint_has_the_same_weights_and_no_earlier_validations(finished_run, tmp_path, capsys):
    source, copies = Checkpoints(str(finished_run)), Checkpoints(str(tmp_path))
    copies.copy(source.at(8))
    url, rejected = copies.newest()
    assert url == copies.at(8)
    assert rejected == []
    assert weights_of(tmp_path) == weights_of(finished_run)
    histories = [
        [entry["step"] for entry in load_state(Path(one.at(8))).history if "val_psnr_db" in entry]
        for one in (source, copies)
    ]
    assert histories == [[4, 8], [8]]
    assert best_checkpoint(str(tmp_path))[0] == url
    assert capsys.readouterr().out == ""


def test_a_damaged_checkpoint_is_not_copied(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "damaged")
    with (tmp_path / "damaged/checkpoints/step-00000008/model/model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has SHA-256"):
        Checkpoints(str(tmp_path / "new")).copy(Checkpoints(str(tmp_path / "damaged")).at(8))
    assert Checkpoints(str(tmp_path / "new")).published() == []


def test_a_member_continues_a_checkpoint_that_its_parent_prunes_in_the_same_generation(tiny, finished_run, tmp_path):
    train = replace(tiny.train, steps=9, validate_every=1, validation_samples=1, keep_checkpoints=1)
    run = replace(tiny, cluster=replace(tiny.cluster, workers=1), train=train)
    parent = Checkpoints(str(shutil.copytree(finished_run, tmp_path / "trials/00000")))
    index = Folder(parent.at(8))
    summary = index.read_hashed("checkpoint.json")
    index.write("checkpoint.json", hashed_json.encode({**summary, "metrics": {"val_psnr_db": -100.0}}))
    members = {"00000": Member("00000", {}), "00002": Member("00002", {"optimizer.lr": 1e-3}, "00000", 8)}
    generation = Population(8, list(members), members)
    scores, errors = population._train(str(tmp_path), run, generation, 9, 1, "val_psnr_db")
    assert (list(scores), errors) == (["00000", "00002"], {})
    assert 8 not in [each["step"] for _, each in parent.published()]
    assert newest(tmp_path / "trials/00002")["step"] == 9

    population._copy_checkpoints(str(tmp_path), generation)
    assert newest(tmp_path / "trials/00002")["step"] == 9


def test_a_member_whose_copied_checkpoint_is_damaged_is_not_trained_from_an_earlier_state(tiny, finished_run, tmp_path):
    url = shutil.copytree(finished_run, tmp_path / "run")
    with (url / "checkpoints/step-00000008/model/model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"no valid checkpoint of step 8 or later; .*has SHA-256.*start a new"):
        population._train_member(to_plain(tiny), str(url), 8, 8)
    shutil.rmtree(url / "checkpoints")
    with pytest.raises(CheckpointError, match="no valid checkpoint of step 8 or later: restore one"):
        population._train_member(to_plain(tiny), str(url), 8, 8)


@pytest.fixture(scope="module")
def searched(tiny, ray_cluster, tmp_path_factory) -> tuple[Path, list[trials.Trial]]:
    """A finished search of two generations, and its table."""
    url = tmp_path_factory.mktemp("populations") / "search"
    search.create(described(tiny), str(url))
    return url, search.fit(str(url))


def described(tiny):
    train = replace(tiny.train, steps=2, validate_every=1, validation_samples=1)
    run = replace(tiny, cluster=replace(tiny.cluster, workers=1), train=train)
    return Search(run, SPACE, trials=2, scheduler="pbt", seed=3)


@pytest.mark.timeout(1200)
def test_a_killed_search_continues_to_the_state_and_the_weights_of_an_unbroken_one(tiny, searched, tmp_path):
    unbroken, expected = searched
    url, run, space = tmp_path / "search", tmp_path / "run.yaml", tmp_path / "space.yaml"
    run.write_text(described(tiny).run.to_yaml())
    space.write_text(yaml.safe_dump(to_plain(SPACE), sort_keys=False))
    words = [str(space), "--preset", str(run), "--trials", "2", "--scheduler", "pbt", "--seed", "3"]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-m", "raylift", "tune", *words, "--output", str(url)]
    with subprocess.Popen(command, env=environment, start_new_session=True) as broken:
        wait_for((url / "trials/00002/run.json").exists, broken)
        os.killpg(broken.pid, signal.SIGKILL)
    assert population.load(str(url)).step == 1, "the injection came too late"
    assert Checkpoints(str(url / "trials/00002")).published()[-1][1]["step"] == 1
    before = {path: path.stat().st_mtime_ns for path in url.glob("trials/*/checkpoints/step-00000001/**/*.safetensors")}
    assert len(before) > 6

    assert cli.main(["tune", "--resume", str(url), "--take-over"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (url / "population.json").read_bytes() == (unbroken / "population.json").read_bytes()
    for name in population.load(str(url)).members:
        assert weights_of(url / "trials" / name) == weights_of(unbroken / "trials" / name)
    table = trials.load_table(str(url))
    assert [replace(trial, checkpoint="") for trial in table] == [replace(trial, checkpoint="") for trial in expected]
    assert search.fit(str(url)) == table


def wait_for(condition, process):
    deadline = time.monotonic() + 400
    while not condition():
        assert process.poll() is None, "the search ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_commands_of_a_member_that_replaced_another_train_its_weights_again(searched, tmp_path, monkeypatch):
    url, table = searched
    child = next(trial for trial in table if trial.id == "00002")
    assert [each.first_step for each in child.lineage] == [0, 1]
    page = Path(search_report.write(str(url))).read_text()
    assert "3 trials of a population of 2: 2 finished, 1 stopped early. 4 of 4 steps were trained." in page
    assert "Lineage of the best trial" in page
    assert f"<td>{child.lineage[0].trial}, step 1</td>" in page
    commands = re.search(r"<h3>00002</h3>\n<pre>(.+?)</pre>", page, re.DOTALL)[1].splitlines()
    assert len(commands) == 2
    monkeypatch.chdir(tmp_path)
    for command, steps in zip(commands, ([1], [1, 2]), strict=True):
        assert cli.main(shlex.split(command)[1:]) == 0
        again = Checkpoints("runs/trial-00002")
        assert [summary["step"] for _, summary in again.published()] == steps
    assert weights_of("runs/trial-00002") == weights_of(url / "trials/00002")


def test_the_table_of_a_population_has_the_lineage_of_each_member(searched):
    url, table = searched
    stored = Folder(str(url)).read_hashed("trials.json")["trials"]
    assert [row["lineage"] for row in stored] == to_plain([trial.lineage for trial in table])
    assert all(trial.lineage[-1].settings == trial.settings for trial in table)
    _, rows = trials.lineage_table(next(trial for trial in table if trial.id == "00002").lineage)
    assert rows[0][0] == "0 to 1"
