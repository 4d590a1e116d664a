"""Runs under Ray Train with real DeepSpeed workers: what they write, and how they resume."""

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.store import Folder
from raylift.datasets.errors import ConfigError
from raylift.models import weights
from raylift.models.zoo import SYSTEMS
from raylift.platform import cli, cluster
from raylift.platform.config import EngineConfig
from raylift.platform.evaluation.evaluate import evaluate
from raylift.platform.export import export
from raylift.platform.training import runs
from raylift.platform.training.checkpoint import Checkpoints
from raylift.platform.training.loop import NonFiniteLossError
from raylift.platform.training.tracking import TensorBoard
from raylift.platform.tuning import search


def tensors_of(checkpoint):
    return {
        path.relative_to(checkpoint).as_posix(): safetensors.torch.load_file(path)
        for path in sorted(checkpoint.rglob("*.safetensors"))
    }


def largest_difference(one, other):
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[file][name] - theirs[file][name]).abs().max()) for file in ours for name in ours[file])


def test_a_finished_run_has_checkpoints_curves_and_its_whole_configuration(finished_run, tiny):
    published = Checkpoints(str(finished_run)).published()
    assert [summary["step"] for _, summary in published] == [4, 8]
    state = json.loads((finished_run / "checkpoints/step-00000008/state.json").read_text())
    assert state["samples_consumed"] == 8 * tiny.train.batch_size
    first = state["history"][0]
    assert {"generator/loss", "discriminator/loss", "generator/grad_norm", "lr"} <= first.keys()
    training_samples = len(Archive(tiny.data.archive).entries("train"))
    assert first["epoch"] == tiny.train.log_every * tiny.train.batch_size / training_samples
    assert first["samples_per_s"] == pytest.approx(tiny.train.batch_size / first["step_time_s"])
    assert 0.1 < first["peak_memory_gib"] < 8
    assert [entry["step"] for entry in state["history"] if "val_psnr_db" in entry] == [4, 8]
    assert list((finished_run / "tensorboard").glob("events*"))
    assert runs.load_run(str(finished_run)).system == tiny.system


def test_the_weights_of_a_checkpoint_are_a_model_without_deepspeed(finished_run):
    model = weights.load(finished_run / "checkpoints/step-00000008")
    assert model.network(torch.rand(1, 2, 32, 32)).shape == (1, 1, 32, 32, 32)
    provenance = model.description.provenance
    assert provenance["step"] == 8
    assert len(provenance["training_samples"]) == 10
    assert model.description.geometry.source_detector_mm == 1800


def test_no_file_of_a_checkpoint_is_a_pickle(finished_run):
    for path in (finished_run / "checkpoints").rglob("*"):
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                assert all(arrays[name].dtype != object for name in arrays)
        elif path.is_file():
            assert path.suffix in {".json", ".safetensors"}


def test_a_run_cut_in_half_ends_in_exactly_the_weights_of_the_whole_one(finished_run, tiny, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(finished_run, half)
    shutil.rmtree(half / "checkpoints/step-00000008")
    runs.fit(tiny, str(half))
    whole, again = (folder / "checkpoints/step-00000008" for folder in (finished_run, half))
    assert largest_difference(whole, again) == 0
    states = [json.loads((folder / "state.json").read_text()) for folder in (whole, again)]
    assert states[0]["metrics"] == states[1]["metrics"]
    assert [entry["step"] for entry in states[0]["history"]] == [entry["step"] for entry in states[1]["history"]]


@pytest.mark.parametrize(
    ("name", "checkpointing"), [("duolift-gan", "none"), ("psr", "all"), ("x-recon", "finest"), ("3dcnn", "none")]
)
def test_systems_with_labels_running_statistics_and_cones_resume_exactly_too(
    name, checkpointing, tiny, ray_cluster, tmp_path
):
    system = replace(SYSTEMS[name].tiny, checkpointing=checkpointing)
    run = replace(tiny, system=system, train=replace(tiny.train, steps=4, validate_every=2, validation_samples=2))
    whole, half = tmp_path / "whole", tmp_path / "half"
    runs.fit(runs.create(run, str(whole)), str(whole))
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints/step-00000004")
    runs.fit(run, str(half))
    ends = [folder / "checkpoints/step-00000004" for folder in (whole, half)]
    assert largest_difference(*ends) == 0
    states = [json.loads((folder / "state.json").read_text()) for folder in ends]
    assert states[0]["metrics"] == states[1]["metrics"]
    lung = [key for key in states[0]["history"][0] if "lung" in key]
    assert bool(lung) == (name == "duolift-gan")
    statistics = [key for file in tensors_of(ends[0]).values() for key in file if "running" in key]
    assert bool(statistics) == (name == "psr")
    model = weights.load(ends[1])
    result = evaluate(model, Archive(tiny.data.archive), protocols=("volume",))
    assert 0 < result.mean("model", "volume")["psnr_db"] < 40
    assert export(model, tmp_path / "exported", states[1]["metrics"]) == weights.load(tmp_path / "exported").sha256


def test_a_run_resumes_with_one_worker_on_another_zero_stage(finished_run, tiny, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(finished_run, half)
    shutil.rmtree(half / "checkpoints/step-00000008")
    changed = replace(tiny, engine=EngineConfig(zero_stage=3), cluster=replace(tiny.cluster, workers=1))
    runs.fit(changed, str(half))
    state = json.loads((half / "checkpoints/step-00000008/state.json").read_text())
    assert state["samples_consumed"] == 8 * tiny.train.batch_size
    whole, again = (folder / "checkpoints/step-00000008" for folder in (finished_run, half))
    moved = largest_difference(finished_run / "checkpoints/step-00000004", whole)
    assert largest_difference(whole, again) < 1.5 * moved


def test_a_damaged_newest_checkpoint_is_rejected_for_the_one_before(finished_run, tmp_path):
    run = tmp_path / "damaged"
    shutil.copytree(finished_run, run)
    path = run / "checkpoints/step-00000008/adam/generator.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    newest, passed_over = Checkpoints(str(run)).newest()
    assert newest.endswith("step-00000004")
    assert len(passed_over) == 1
    assert "adam/generator.safetensors has SHA-256" in passed_over[0]


def test_a_finished_run_is_not_trained_again(finished_run, tiny):
    before = (finished_run / "checkpoints/step-00000008/checkpoint.json").stat().st_mtime_ns
    metrics = runs.fit(tiny, str(finished_run))
    assert (finished_run / "checkpoints/step-00000008/checkpoint.json").stat().st_mtime_ns == before
    assert "val_psnr_db" in metrics


def test_a_loss_that_is_not_finite_stops_the_run_before_the_optimizer_step(tiny, ray_cluster, tmp_path):
    # Weights of 1e30 after the first step make the next loss infinite.
    broken = replace(tiny, optimizer=replace(tiny.optimizer, lr=1e30), train=replace(tiny.train, validate_every=1))
    url = str(tmp_path / "broken")
    with pytest.raises(NonFiniteLossError, match=r"loss at step \d is (nan|inf) on samples phantom-1-\d{4}"):
        runs.fit(runs.create(broken, url), url)
    newest, _ = Checkpoints(url).newest()
    assert newest is None or "step-" in newest


def test_a_run_folder_is_not_started_twice(finished_run, tiny):
    with pytest.raises(ConfigError, match="resume it with --resume"):
        runs.create(tiny, str(finished_run))


def test_a_run_that_can_never_be_scheduled_is_refused_at_once(tiny, ray_cluster, tmp_path):
    greedy = replace(tiny, cluster=replace(tiny.cluster, workers=64), train=replace(tiny.train, batch_size=64))
    url = str(tmp_path / "greedy")
    with pytest.raises(cluster.ClusterTooSmallError, match="needs 64 CPUs and this cluster has"):
        runs.fit(runs.create(greedy, url), url)
    # It failed before its first step, so the same command with other settings starts it.
    runs.create(tiny, url)
    assert runs.load_run(url).cluster == tiny.cluster
    assert [path.name for path in (tmp_path / "greedy").iterdir()] == ["run.json"]


def test_a_run_that_another_process_starts_is_not_replaced_until_that_process_ended(tiny, tmp_path):
    url, settings = str(tmp_path / "run"), tmp_path / "run.yaml"
    settings.write_text(tiny.to_yaml())
    code = """if True:
        import sys
        from raylift.platform.presets import named_run
        from raylift.platform.training import runs
        runs.create(named_run(sys.argv[1]), sys.argv[2])
        print("created", flush=True)
        sys.stdin.read()"""
    command = [sys.executable, "-c", code, str(settings), url]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "created\n"
        with pytest.raises(ConfigError, match=f"process {other.pid} has just started this run"):
            runs.create(tiny, url)
    finally:
        other.communicate(timeout=60)
    runs.create(tiny, url)


def test_a_run_has_no_curves_before_its_first_entry_and_is_not_replaced_after_it(tiny, tmp_path):
    url = str(tmp_path / "run")
    runs.create(tiny, url)
    curves = TensorBoard(url, [])
    runs.create(tiny, url)
    curves.scalars({"step": 2.0, "lr": 0.1})
    curves.close()
    with pytest.raises(ConfigError, match="resume it with --resume"):
        runs.create(tiny, url)


def test_a_search_that_failed_before_its_first_trial_is_started_again_and_a_running_one_is_not(tiny, tmp_path):
    url = str(tmp_path / "search")
    first = search.Search(run=tiny, space=search.Space({}), trials=1)
    search.create(first, url)
    search.create(replace(first, trials=2), url)
    assert search.load_search(url).trials == 2
    (tmp_path / "search/trials").mkdir()
    with pytest.raises(ConfigError, match="resume it with --resume"):
        search.create(first, url)


def test_an_archive_of_another_size_is_refused_before_anything_starts(tiny, tmp_path):
    other = replace(tiny, data=replace(tiny.data, size=64))
    with pytest.raises(ConfigError, match=r"pass --data\.size 32"):
        runs.fit(runs.create(other, str(tmp_path / "other")), str(tmp_path / "other"))


def test_settings_that_make_no_network_are_refused_before_anything_is_written(tiny, tmp_path):
    lifting = replace(tiny.system.lifting, kind="attention", heads=3)
    with pytest.raises(ConfigError, match="3 heads do not divide"):
        runs.create(replace(tiny, system=replace(tiny.system, lifting=lifting)), str(tmp_path / "unmade"))
    with pytest.raises(ConfigError, match=r"pass --data\.size 32"):
        runs.create(replace(tiny, data=replace(tiny.data, size=64)), str(tmp_path / "unmade"))
    assert not (tmp_path / "unmade").exists()


def test_event_files_of_a_run_in_a_bucket_are_copied_there_and_leave_no_local_folder(
    s3_bucket_url, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    writer = TensorBoard(f"{s3_bucket_url}/events", [])
    writer.validation(1, {"val_psnr_db": 20.0}, None)
    assert len(list(tmp_path.glob("raylift-event-files-*"))) == 1
    writer.close()
    assert not list(tmp_path.iterdir())
    (name,) = Folder(f"{s3_bucket_url}/events/tensorboard").names()
    assert name.startswith("events.out.tfevents")


@pytest.mark.parametrize("until", [3, 8])
def test_a_step_to_which_a_run_is_already_trained_is_refused_as_its_end(finished_run, until, capsys):
    before = (finished_run / "run.json").read_bytes()
    assert cli.main(["train", "--resume", str(finished_run), "--until", str(until), "--train.log-every", "1"]) == 2
    assert (
        f"--until {until} is not above step 8, to which {finished_run} is trained: raise it" in capsys.readouterr().err
    )
    assert (finished_run / "run.json").read_bytes() == before
