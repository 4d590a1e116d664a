"""The scans of a comparison: kept when a run is killed, and evaluated by Ray actors."""

import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from raylift.datasets.archive.archive import Archive
from raylift.datasets.errors import AlteredFileError, WorkersLostError
from raylift.datasets.intensity import Window
from raylift.datasets.scans.resample import archive_image
from raylift.models import weights
from raylift.models.weights import Description
from raylift.platform import cli, cluster
from raylift.platform.evaluation import cases
from raylift.platform.evaluation.case_cache import CaseCache
from raylift.platform.evaluation.cases import CaseEvaluator
from raylift.platform.evaluation.predictors import ArchiveDescription, FolderPredictor
from raylift.platform.presets import PRESETS

KILLED = """
import os, signal, sys
from pathlib import Path
from raylift.datasets.archive.archive import Archive
from raylift.models import weights
from raylift.platform.evaluation.compare import compare
from raylift.platform.evaluation.case_cache import CaseCache

home, archive, output = sys.argv[1:]
candidates = {"a": weights.load(Path(home) / "a"), "theirs": Path(home) / "theirs"}
kill = lambda done, total, text: os.kill(os.getpid(), signal.SIGKILL) if done == 2 else None
cache = CaseCache(Path(output) / "finished-scans")
compare(candidates, [Archive(archive)], split="all", protocols=["volume"], cache=cache, progress=kill)
"""


@pytest.fixture(scope="module")
def home(archive32, tmp_path_factory):
    """An untrained model `a`, a diffusion model `sampled`, and five volumes with noise in a folder `theirs`."""
    home, archive = tmp_path_factory.mktemp("candidates"), Archive(str(archive32))
    grid, geometry = archive.manifest.grid, archive.manifest.geometry
    for name, preset in (("a", "x2ct-gan-tiny"), ("sampled", "diffux2ct-tiny")):
        system = PRESETS[preset].system
        torch.manual_seed(0)
        # Networks of diffusion start at zero, from which every seed gives the same volume.
        state = {
            key: tensor + 0.05 * torch.randn(tensor.shape) if tensor.is_floating_point() else tensor
            for key, tensor in system.reconstruction_network(grid, geometry).state_dict().items()
        }
        weights.save(home / name, state, Description(system, grid, geometry, Window()))
    (home / "theirs").mkdir()
    for k, entry in enumerate(archive.entries()[7:]):
        hu = archive.read_array(entry, "volumes").astype(np.float32)
        noisy = hu + np.random.default_rng(k).normal(0, 30, hu.shape).astype(np.float32)
        sitk.WriteImage(archive_image(noisy, grid), str(home / "theirs" / f"{entry.id}.nii.gz"))
    return home


def compare(home, archive32, output, *options, names=("a", "theirs")):
    words = ["--archive", str(archive32), "--split", "all", "--protocols", "volume", "--output", str(output)]
    return cli.main(["compare", *(str(home / name) for name in names), *words, *options])


@pytest.fixture(scope="module")
def unbroken(home, archive32, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken")
    assert compare(home, archive32, output) == 0
    return output


def results(output):
    """Every metric, and the bytes of every figure and table."""
    metrics = json.loads((output / "metrics.json").read_text())
    files = sorted(path for path in output.rglob("*") if path.suffix in (".png", ".csv"))
    timed = ("seconds_per_volume", "provenance")
    return {key: value for key, value in metrics.items() if key not in timed}, {p.name: p.read_bytes() for p in files}


def test_a_comparison_that_was_killed_continues_with_the_scans_that_are_missing(
    home, archive32, unbroken, tmp_path, monkeypatch, capsys
):
    words = [sys.executable, "-c", KILLED, str(home), str(archive32), str(tmp_path)]
    ended = subprocess.run(words, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "finished-scans").iterdir())) == 2
    evaluated, evaluate = [], CaseEvaluator.evaluate
    monkeypatch.setattr(CaseEvaluator, "evaluate", lambda self, k: evaluated.append(k) or evaluate(self, k))
    assert compare(home, archive32, tmp_path) == 0
    assert evaluated == [2, 3, 4]
    reported = capsys.readouterr().out
    assert "compare: 2/5 phantom-1-0009" in reported
    assert "2 of 5 scans were finished by a run that was interrupted" in reported
    assert results(tmp_path) == results(unbroken)
    assert not (tmp_path / "finished-scans").exists()


def evaluator(home, archive32, protocols=("volume",)):
    """The scans of the folder `theirs`, two of them plotted."""
    archive = Archive(str(archive32))
    scans = [(entry.id, archive, entry) for entry in archive.entries()[7:]]
    own = FolderPredictor("theirs", home / "theirs", ArchiveDescription.of(archive), False)
    return CaseEvaluator(scans, frozenset({0, 4}), [own], [], protocols, True)


def test_kept_scans_are_equal_to_the_evaluated_ones_and_of_the_same_settings_only(home, archive32, tmp_path):
    first = evaluator(home, archive32)
    made = cases.evaluate(first, 1, CaseCache(tmp_path), lambda *_: None)
    cache = CaseCache(tmp_path)
    counts = []
    loaded = cases.evaluate(first, 1, cache, lambda done, total, text: counts.append((done, total)))
    assert counts == [(5, 5)]
    assert cache.loaded == 5
    for one, other in zip(made, loaded, strict=True):
        assert replace(one, images=None, thumbnails={}) == replace(other, images=None, thumbnails={})
        assert all(np.array_equal(one.thumbnails[name], other.thumbnails[name]) for name in ("CT", "theirs"))
    assert [case.images is None for case in loaded] == [False, True, True, True, False]
    for name in ("CT", "theirs"):
        for one, other in zip(made[0].images.slices[name], loaded[0].images.slices[name], strict=True):
            np.testing.assert_array_equal(one, other)
    keys = set(first.keys())
    assert not keys & set(evaluator(home, archive32, ("volume", "x2ct")).keys())
    assert keys == set(evaluator(home, archive32).keys())
    os.utime(home / "theirs/phantom-1-0009.nii.gz", ns=(1, 1))
    assert not keys & set(evaluator(home, archive32).keys())


def test_a_kept_scan_that_is_damaged_is_an_error_with_a_remedy(home, archive32, tmp_path):
    of = evaluator(home, archive32)
    cases.evaluate(of, 1, CaseCache(tmp_path), lambda *_: None)
    path = tmp_path / f"{of.keys()[1]}.npz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(AlteredFileError, match=r"is damaged .*: remove it, and its scan is evaluated again"):
        cases.evaluate(of, 1, CaseCache(tmp_path), lambda *_: None)


def test_two_ray_actors_give_every_metric_and_figure_bit_for_bit(
    ray_cluster, home, archive32, unbroken, tmp_path, capsys
):
    assert compare(home, archive32, tmp_path, "--workers", "2") == 0
    assert results(tmp_path) == results(unbroken)
    reported = capsys.readouterr()
    assert "compare: 5/5" in reported.out
    assert reported.err == ""


def test_a_worker_reads_its_scan_and_not_the_entries_of_the_archive(home, archive32):
    sent = pickle.loads(pickle.dumps(evaluator(home, archive32)))
    assert sent.evaluate(0).name == "phantom-1-0007"
    (archive,) = {id(archive): archive for _, archive, _ in sent.scans}.values()
    assert "_all" not in vars(archive.manifest.entries)
    assert len(archive.entries()) == 12
    assert "_all" in vars(archive.manifest.entries)


class Fatal:
    """Ends its process with the first scan, or with each one if there is no marker."""

    fingerprint = "fatal"

    def __init__(self, predictor, marker=None):
        self.predictor, self.marker = predictor, marker

    def predict(self, archive, entry, ground_truth):
        if self.marker is None or not self.marker.exists():
            if self.marker:
                self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.predictor.predict(archive, entry, ground_truth)


def test_a_lost_actor_is_started_again_and_one_that_is_always_lost_is_an_error(ray_cluster, home, archive32, tmp_path):
    of = evaluator(home, archive32)
    expected = [case.metrics for case in cases.evaluate(of, 1, None, lambda *_: None)]
    once = replace(of, candidates=[Fatal(of.candidates[0], tmp_path / "ended")])
    found = cases.evaluate(once, 2, None, lambda *_: None)
    assert (tmp_path / "ended").exists()
    assert [case.metrics for case in found] == expected
    with pytest.raises(WorkersLostError, match="the same command continues with the scans that remain"):
        cases.evaluate(replace(of, candidates=[Fatal(of.candidates[0])]), 2, None, lambda *_: None)


def test_errors_of_actors_and_numbers_of_workers_are_reported_in_a_sentence(
    ray_cluster, home, archive32, tmp_path, capsys
):
    assert compare(home, archive32, tmp_path, "--workers", "0") == 2
    assert "0 workers: give 1 or more" in capsys.readouterr().err
    cpus = cluster.capacity(1, 0)
    of = evaluator(home, archive32)
    many = replace(of, scans=of.scans * cpus)
    with pytest.raises(
        cluster.ClusterTooSmallError, match=rf"needs {5 * cpus} CPUs .* lower --workers or OMP_NUM_THREADS"
    ):
        cases.evaluate(many, 5 * cpus, None, lambda *_: None)
    other = tmp_path / "other"
    other.mkdir()
    grid = replace(Archive(str(archive32)).manifest.grid, spacing_mm=9.0)
    for name in ("0007", "0008"):
        image = archive_image(np.full(grid.shape, -500, np.float32), grid)
        sitk.WriteImage(image, str(other / f"phantom-1-{name}.mha"))
    assert compare(tmp_path, archive32, tmp_path / "out", "--workers", "2", names=("other",)) == 2
    reported = capsys.readouterr().err
    assert "pass --resample to resample" in reported
    assert "Traceback" not in reported


def test_settings_of_sampling_are_those_of_the_models_that_sample(home, archive32, tmp_path, capsys):
    settings = ["--steps", "2", "--sampler", "ddim", "--samples", "2"]
    means = []
    for seed in ("3", "4"):
        words = [*settings, "--seed", seed, "--consistency-steps", "2"]
        assert compare(home, archive32, tmp_path, *words, names=("a", "sampled")) == 0
        metrics = json.loads((tmp_path / "metrics.json").read_text())
        assert metrics["provenance"]["sampling"] == {
            "sampled": {"sampler": "ddim", "steps": 2, "seed": int(seed), "samples": 2}
        }
        means.append({name: metrics["mean"][name]["volume"]["psnr_db"] for name in ("a", "sampled")})
    assert means[0]["a"] == means[1]["a"]
    assert means[0]["sampled"] != means[1]["sampled"]
    for name in ("a", "sampled"):
        before, after = metrics["projection_residuals"][name]["mean"]["frontal"]
        assert after < before
        assert f"{name} + data-consistency fit" in metrics["mean"]
    assert (tmp_path / "report.md").read_text().count("## Reprojection residual") == 2
    assert compare(home, archive32, tmp_path, "--steps", "2") == 2
    assert "this model is deterministic: leave out --steps" in capsys.readouterr().err
