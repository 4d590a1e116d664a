"""The inputs of a run depend on its system and archive; unsuitable ones are refused before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_ranks
from torch import nn

from raylift.datasets.archive.archive import Archive, RadiographSample
from raylift.datasets.archive.entry import Entry
from raylift.datasets.archive.splits import SplitRule
from raylift.datasets.archive.writer import ArchiveWriter
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Grid, chest, parallel
from raylift.datasets.ingest.synthetic import ingest_phantoms
from raylift.datasets.ingest.xray import ingest_radiographs
from raylift.datasets.intensity import Window, normalize
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import render_drrs
from raylift.datasets.radiographs.decoding import read
from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.datasets.radiographs.histogram import quantiles
from raylift.datasets.streaming.order import BatchPartition
from raylift.models import weights
from raylift.models.baselines import BackProjection
from raylift.models.composition import Composition
from raylift.models.consistency import reprojection_metrics
from raylift.models.metrics import VOLUME
from raylift.models.training_data import TrainingData
from raylift.models.zoo import SYSTEMS
from raylift.platform.config import RunConfig, with_absolute_paths
from raylift.platform.monitor import format_metrics, monitored
from raylift.platform.presets import PRESETS
from raylift.platform.training.inputs import check, describe, open_stream, training_data
from raylift.platform.training.validation import Validation
from raylift.serve.reconstructor import prepare_radiographs

GRID = Grid(32, 10.0)


def from_radiographs(run: RunConfig, **data: Any) -> RunConfig:
    """The run with a system supervised by radiographs, and other data."""
    system = SYSTEMS["cyclegan-b"].tiny
    return replace(run, system=system, data=replace(run.data, **{name: str(value) for name, value in data.items()}))


@pytest.fixture(scope="session")
def pairs32(pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of those radiographs."""
    url = tmp_path_factory.mktemp("pairs32")
    limits = RadiographLimits()
    report = ingest_radiographs(
        [pairs_folder], str(url), GRID, chest(GRID), limits=limits, split_fractions=(0.6, 0.2, 0.2)
    )
    assert len(report.added) == 10
    return url


@pytest.mark.parametrize("lung", [0.0, 10.0])
def test_labels_are_read_for_a_loss_inside_the_lungs_and_only_then(
    tiny: RunConfig, archive32: Path, lung: float
) -> None:
    system = tiny.system
    assert isinstance(system, Composition)
    run = replace(tiny, system=replace(system, loss=replace(system.loss, lung_weight=lung)))
    archive = Archive(str(archive32))
    stream = open_stream(archive, run, describe(run, archive), BatchPartition(0, 1, 4, 1))
    (batch,) = next(iter(stream))
    assert (batch.labels is not None) == (lung > 0)
    if batch.labels is not None:
        assert batch.labels.shape == batch.volume.shape
        assert batch.labels.any()


@pytest.mark.parametrize("kind", ["volumes", "radiographs"])
def test_a_system_supervised_by_radiographs_never_receives_a_volume_of_the_same_subjects(
    kind: str, tiny: RunConfig, archive32: Path, pairs32: Path
) -> None:
    run = from_radiographs(tiny, archive=archive32 if kind == "volumes" else pairs32, unpaired=archive32)
    archive = check(run)
    assert archive.manifest.contents == kind
    subjects = {entry.id: entry for entry in archive.entries()}
    others = Archive(str(archive32))
    own = {bytes(run.data.window.to_unit(others.read(e).volume.astype(np.float32))): e for e in others.entries()}
    stream = iter(open_stream(archive, run, describe(run, archive), BatchPartition(0, 1, 4, 2)))
    subjects_used = set()
    for _ in range(6):
        for batch in next(stream):
            assert batch.ground_truth is None
            assert batch.labels is None
            assert batch.radiographs.shape == (2, 2, 32, 32)
            assert batch.unpaired is not None
            for name, volume in zip(batch.ids, batch.unpaired, strict=True):
                person = own[bytes(volume.numpy())]
                assert person.split == "train", "held-out subjects are not used"
                assert person.subject != subjects[name].subject
                subjects_used.add(person.subject)
            with pytest.raises(ConfigError, match="only systems supervised by volumes"):
                _ = batch.volume
    assert len(subjects_used) == len(others.entries("train"))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_resumed_run_continues_with_the_same_radiographs_and_unpaired_volumes(
    world: int, tiny: RunConfig, archive32: Path, pairs32: Path
) -> None:
    run = from_radiographs(tiny, archive=pairs32, unpaired=archive32)
    archive = check(run)
    description = describe(run, archive)

    def taken(workers: int, begin: int, steps: int) -> list[list[tuple[str, bytes]]]:
        streams = [
            iter(open_stream(archive, run, description, BatchPartition(k, workers, 4), begin)) for k in range(workers)
        ]
        found = []
        for _ in range(steps):
            batches = [batch for stream in streams for batch in next(stream)]
            found.append(
                [
                    (name, bytes(volume.numpy()))
                    for batch in batches
                    for name, volume in zip(batch.ids, batch.unpaired, strict=True)
                ]
            )
        return found

    whole = taken(1, 0, 5)
    assert taken(world, 8, 3) == whole[2:]


def test_the_unpaired_archive_is_in_the_models_description(tiny: RunConfig, archive32: Path, pairs32: Path) -> None:
    run = from_radiographs(tiny, archive=pairs32, unpaired=archive32)
    archive = check(run)
    provenance = describe(run, archive).provenance
    assert provenance["archive_contents"] == "radiographs"
    assert provenance["unpaired"]["archive"] == str(archive32)
    assert provenance["unpaired"]["samples"] == [entry.id for entry in Archive(str(archive32)).entries("train")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"archive": "pairs32"},
            "holds radiographs without CT, and system x2ct-gan is supervised by volumes and needs CT",
        ),
        (
            {"unpaired": "archive32"},
            "system x2ct-gan is supervised by the volumes of .* uses no others: leave data.unp",
        ),
    ],
)
def test_a_system_supervised_by_volumes_takes_them_from_its_archive(
    change: dict[str, str], message: str, tiny: RunConfig, request: pytest.FixtureRequest
) -> None:
    data = {name: str(request.getfixturevalue(fixture)) for name, fixture in change.items()}
    with pytest.raises(ConfigError, match=message):
        check(replace(tiny, data=replace(tiny.data, **data)))


def test_a_resumed_run_keeps_its_reference_histograms(tiny: RunConfig, archive32: Path, tmp_path: Path) -> None:
    run = matching(tiny)
    begun = describe(run, check(run))
    begun = replace(begun, histograms={name: tuple(q / 2 for q in line) for name, line in begun.histograms.items()})
    state = begun.system.reconstruction_network(begun.grid, begun.geometry).state_dict()
    weights.save(tmp_path, state, begun)
    assert (
        describe(run, check(run), str(tmp_path)).histograms == begun.histograms != describe(run, check(run)).histograms
    )


def test_training_data_are_of_the_archives_and_of_the_models_that_a_run_starts_with(
    tiny: RunConfig, archive32: Path, pairs32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volumes, pairs = (
        {entry.source_sha256 for entry in Archive(str(url)).entries("train")} for url in (archive32, pairs32)
    )
    alone = from_radiographs(tiny, archive=pairs32)
    data = training_data(check(alone), alone, describe(alone, check(alone)))
    assert (data.scans, data.baselines) == (pairs, None)
    run = from_radiographs(tiny, archive=pairs32, unpaired=archive32)
    description = describe(run, check(run))
    data = training_data(check(run), run, description)
    assert data.scans == volumes | pairs
    assert data.baselines is not None
    assert data.baselines.volumes == len(volumes)
    monkeypatch.setattr("raylift.platform.training.inputs.MAX_BASELINE_VOLUMES", 4)
    few = training_data(check(run), run, description)
    assert few.baselines is not None
    assert few.baselines.volumes == 4

    # A model whose training scans are unknown, and two that were trained on others.
    state = description.system.reconstruction_network(description.grid, description.geometry).state_dict()
    weights.save(tmp_path / "unknown", state, description)
    other = TrainingData(frozenset({"ab" * 32}))
    weights.save(tmp_path / "known", state, description, training_data=other)
    later = TrainingData(data.scans | other.scans, data.baselines)
    weights.save(tmp_path / "checkpoint", state, description, training_data=later)
    for name, scans, unlisted in (("unknown", set(), 1), ("known", other.scans, 0)):
        begun = replace(run, train=replace(run.train, initial_model=str(tmp_path / name)))
        found = training_data(check(begun), begun, description)
        assert (found.scans, found.unlisted) == (volumes | pairs | scans, unlisted)
    # A resumed run does not fit the baselines again.
    resumed = training_data(check(run), run, description, str(tmp_path / "checkpoint"))
    assert resumed.scans == later.scans
    assert resumed.baselines is not None
    assert resumed.baselines.volumes == len(volumes)


def test_unpaired_volumes_that_do_not_fit_are_refused(tiny: RunConfig, pairs32: Path, tmp_path: Path) -> None:
    other, held_out = tmp_path / "other", tmp_path / "held-out"
    ingest_phantoms(str(other), Grid(32, 8.0), chest(Grid(32, 8.0)), count=1, seed=0)
    ingest_phantoms(str(held_out), GRID, chest(GRID), count=1, seed=0, split_fractions=(0.0, 0.0, 1.0))
    for url, message in (
        (pairs32, "holds radiographs without CT, and data.unpaired needs CT"),
        (other, r"holds Grid\(size=32, spacing_mm=8.0\), .* is for Grid\(size=32, spacing_mm=10.0\)"),
        (held_out, "has no sample in the train split"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(from_radiographs(tiny, archive=pairs32, unpaired=url))
    run = from_radiographs(tiny, archive=pairs32)
    larger = replace(run, data=replace(run.data, size=64))
    with pytest.raises(ConfigError, match=r"is for volumes of 32 voxels per side, the run has data.size 64: pass"):
        check(larger)


def test_paths_are_made_absolute(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    run = with_absolute_paths(from_radiographs(tiny, archive="a", unpaired="b"))
    assert (run.data.archive, run.data.unpaired) == (str(tmp_path / "a"), str(tmp_path / "b"))
    assert with_absolute_paths(tiny).data.unpaired == ""


# --- augmentation and phantoms ---


def with_data(run: RunConfig, **data: Any) -> RunConfig:
    """The run with augmentation and other settings of its data."""
    augmentation = replace(run.data.augmentation, enabled=True)
    return replace(run, data=replace(run.data, **{"augmentation": augmentation, **data}))


def samples_of(run: RunConfig, workers: int, begin: int, steps: int) -> list[list[tuple[str, bytes, bytes, bytes]]]:
    """Id, ground truth, radiographs and labels of every sample of each global batch, over all workers."""
    archive = check(run)
    description = describe(run, archive)
    streams = [
        iter(open_stream(archive, run, description, BatchPartition(k, workers, 4), begin)) for k in range(workers)
    ]
    found = []
    for _ in range(steps):
        batches = [batch for stream in streams for batch in next(stream)]
        found.append(
            [
                (name, *(bytes(tensor[k].numpy()) for tensor in (batch.volume, batch.radiographs, batch.labels)))
                for batch in batches
                for k, name in enumerate(batch.ids)
            ]
        )
    return found


def needing_labels(run: RunConfig) -> RunConfig:
    system = run.system
    assert isinstance(system, Composition)
    return replace(run, system=replace(system, loss=replace(system.loss, lung_weight=10.0)))


@pytest.mark.parametrize("world", [1, 2])
def test_augmented_samples_and_phantoms_are_bit_equal_on_any_number_of_ranks_and_after_resuming(
    world: int, tiny: RunConfig, archive32: Path
) -> None:
    run = needing_labels(with_data(tiny, phantoms_per_epoch=4, ct_repeats=2))
    whole = samples_of(run, 1, 0, 5)
    assert samples_of(run, world, 8, 3) == whole[2:]
    assert len({volume for batch in whole for _, volume, _, _ in batch}) == 20, "a new pair at every position"
    other = replace(run, train=replace(run.train, seed=1))
    assert not {sample[1] for sample in samples_of(other, 1, 0, 1)[0]} & {sample[1] for sample in whole[0]}


def test_an_epoch_repeats_every_ct_and_has_new_phantoms_whose_seeds_no_archive_has(
    tiny: RunConfig, archive32: Path
) -> None:
    run = replace(tiny, data=replace(tiny.data, phantoms_per_epoch=5, ct_repeats=3))
    archive = check(run)
    entries = archive.entries("train")
    length = 3 * len(entries) + 5
    stream = iter(open_stream(archive, run, describe(run, archive), BatchPartition(0, 1, length)))
    phantoms: list[set[str]] = []
    for _ in range(2):
        (batch,) = next(stream)
        stored = [name for name in batch.ids if name in {entry.id for entry in entries}]
        assert sorted(stored) == sorted([entry.id for entry in entries] * 3)
        phantoms.append(set(batch.ids) - set(stored))
    assert [len(names) for names in phantoms] == [5, 5]
    assert not phantoms[0] & phantoms[1]
    seeds = {int(name.removeprefix("phantom-")) for names in phantoms for name in names}
    assert min(seeds) >= 2**32 > max(int(entry.record["phantom_seed"]) for entry in archive.entries())


def test_a_phantom_of_the_stream_is_what_an_archive_would_hold_of_it(tiny: RunConfig, archive32: Path) -> None:
    run = replace(tiny, data=replace(tiny.data, phantoms_per_epoch=50))
    archive = check(run)
    (batch,) = next(iter(open_stream(archive, run, describe(run, archive), BatchPartition(0, 1, 4))))
    name = next(name for name in batch.ids if name.startswith("phantom-4"))
    hu, _ = thorax(int(name.removeprefix("phantom-")), GRID)
    index = batch.ids.index(name)
    torch.testing.assert_close(batch.volume[index, 0].numpy(), run.data.window.to_unit(hu.astype(np.float32)))
    expected = [normalize(image) for image in render_drrs(hu, GRID, archive.manifest.geometry)]
    np.testing.assert_array_equal(batch.radiographs[index], expected)


def test_a_system_supervised_by_radiographs_receives_augmented_ones_without_their_ct(
    tiny: RunConfig, archive32: Path
) -> None:
    plain = from_radiographs(tiny, archive=archive32, unpaired=archive32)
    both = []
    for run in (plain, with_data(plain)):
        archive = check(run)
        (batch,) = next(iter(open_stream(archive, run, describe(run, archive), BatchPartition(0, 1, 4))))
        assert batch.ground_truth is None
        both.append(batch)
    assert both[0].ids == both[1].ids
    assert torch.equal(both[0].unpaired, both[1].unpaired)
    assert not torch.allclose(both[0].radiographs, both[1].radiographs, atol=0.1)


def test_augmented_radiographs_are_matched_to_the_histograms_of_the_model(tiny: RunConfig, archive32: Path) -> None:
    run = with_data(matching(tiny))
    archive = check(run)
    description = describe(run, archive)
    (batch,) = next(iter(open_stream(archive, run, description, BatchPartition(0, 1, 8))))
    (unmatched,) = next(iter(open_stream(archive, with_data(tiny), describe(tiny, archive), BatchPartition(0, 1, 8))))
    reference = np.array(description.reference_quantiles[0])
    distances = [
        np.mean([np.abs(quantiles(frontal) - reference).mean() for frontal in one.radiographs[:, 0].numpy()])
        for one in (batch, unmatched)
    ]
    assert distances[0] < 0.3 * distances[1]


def test_augmentation_and_phantoms_need_ct_and_a_cone_beam(tiny: RunConfig, pairs32: Path, tmp_path: Path) -> None:
    without_ct = from_radiographs(tiny, archive=pairs32)
    for run, message in (
        (with_data(without_ct), r"holds radiographs without CT, and data\.augmentation needs CT"),
        (
            replace(without_ct, data=replace(without_ct.data, phantoms_per_epoch=1)),
            r"holds radiographs without CT, and data\.phantoms_per_epoch needs CT",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            check(run)
    ingest_phantoms(str(tmp_path), GRID, parallel(GRID), count=4, seed=0)
    with pytest.raises(ConfigError, match="augmentation projects cone beams only, and this geometry is parallel"):
        check(with_data(tiny, archive=str(tmp_path)))


# --- histograms ---


def matching(run: RunConfig) -> RunConfig:
    return replace(run, data=replace(run.data, match_histograms=True))


@pytest.mark.parametrize("match", [False, True])
def test_training_and_service_prepare_the_same_files_identically(
    match: bool, tiny: RunConfig, archive32: Path, pairs32: Path, pairs_folder: Path
) -> None:
    run = from_radiographs(tiny, archive=pairs32, unpaired=archive32)
    run = matching(run) if match else run
    archive = check(run)
    description = describe(run, archive)
    (batch,) = next(iter(open_stream(archive, run, description, BatchPartition(0, 1, 4))))
    for name, radiographs in zip(batch.ids, batch.radiographs, strict=True):
        images = {
            view: read((pairs_folder / f"{name}_{word}.png").read_bytes(), "upload", view=view).pixels
            for view, word in (("frontal", "pa"), ("lateral", "lat"))
        }
        np.testing.assert_array_equal(radiographs.numpy(), prepare_radiographs(images, description))


def test_histogram_matching_moves_radiographs_closer_to_their_drrs(
    tiny: RunConfig, archive32: Path, pairs32: Path
) -> None:
    plain = from_radiographs(tiny, archive=pairs32, unpaired=archive32)
    distances = []
    for run in (plain, matching(plain)):
        archive = check(run)
        (batch,) = next(iter(open_stream(archive, run, describe(run, archive), BatchPartition(0, 1, 6))))
        ground_truth = [
            normalize(image)
            for name in batch.ids
            for image in render_drrs(thorax(int(name[-3:]), GRID)[0], GRID, chest(GRID))
        ]
        distances.append(float(np.abs(batch.radiographs.flatten(0, 1).numpy() - np.stack(ground_truth)).mean()))
    assert distances[1] < 0.6 * distances[0]


def test_a_model_of_drrs_keeps_their_histograms_for_inference(tiny: RunConfig, archive32: Path) -> None:
    archive = check(matching(tiny))
    description = describe(matching(tiny), archive)
    assert list(description.histograms) == ["frontal", "lateral"]
    assert describe(tiny, archive).histograms == {}
    (batch,) = next(iter(open_stream(archive, matching(tiny), description, BatchPartition(0, 1, 4))))
    stored = {entry.id: archive.read_array(entry, "radiographs") for entry in archive.entries()}
    for name, radiographs in zip(batch.ids, batch.radiographs, strict=True):
        images = dict(zip(("frontal", "lateral"), stored[name], strict=True))
        np.testing.assert_allclose(radiographs.numpy(), prepare_radiographs(images, description), atol=1e-5)


def test_without_drrs_in_its_geometry_histograms_cannot_be_matched(
    tiny: RunConfig, pairs32: Path, tmp_path: Path
) -> None:
    ingest_phantoms(str(tmp_path), GRID, parallel(GRID), count=4, seed=0)
    for unpaired in ("", tmp_path):
        with pytest.raises(ConfigError, match=r"data\.match-histograms needs DRRs, and .* real radiographs"):
            check(matching(from_radiographs(tiny, archive=pairs32, unpaired=unpaired)))


# --- validation ---


def validated(rank: int, world: int, archive: str, samples: int) -> dict[str, float]:
    run = from_radiographs(PRESETS["x2ct-gan-tiny"], archive=archive)
    run = replace(run, train=replace(run.train, validation_samples=samples))
    opened = Archive(archive)
    description = describe(run, opened)
    network = Scaled(BackProjection(GRID, description.geometry))
    validation = Validation(opened, run, description, rank, world, torch.device("cpu"))
    metrics, slices = validation.run(network)
    assert slices is not None
    assert network.training
    return metrics


class Scaled(nn.Module):
    """Back-projection at half its values."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        prediction: torch.Tensor = 0.5 * self.network(views)
        return prediction


def validated_against_ct(rank: int, world: int, archive: str, window: Window) -> dict[str, float]:
    run = PRESETS["x2ct-gan-tiny"]
    run = replace(run, data=replace(run.data, archive=archive, window=window))
    opened = Archive(archive)
    description = describe(run, opened)
    network = Scaled(BackProjection(GRID, description.geometry))
    return Validation(opened, run, description, rank, world, torch.device("cpu")).run(network)[0]


@pytest.mark.parametrize("window", [Window(), Window(-1000.0, 4096.0), Window(-900.0, 300.0)])
def test_with_ct_a_run_is_validated_under_protocol_volume_for_any_window(window: Window, archive32: Path) -> None:
    (metrics,) = run_ranks(1, validated_against_ct, 1, str(archive32), window)
    archive = Archive(str(archive32))
    found = []
    for entry in archive.entries("val")[: PRESETS["x2ct-gan-tiny"].train.validation_samples]:
        views = np.stack([normalize(image) for image in archive.read_array(entry, "radiographs")])
        prediction = 0.5 * BackProjection(GRID, archive.manifest.geometry)(torch.from_numpy(views)[None])
        hu = window.to_hu(prediction)[0, 0].numpy()
        found.append(VOLUME.evaluate(hu, archive.read_array(entry, "volumes").astype(np.float32)))
    assert found
    assert metrics["val_psnr_db"] == pytest.approx(np.mean([values["psnr_db"] for values in found]), rel=1e-4)
    assert metrics["val_mae_hu"] == pytest.approx(np.mean([values["mae_hu"] for values in found]), rel=1e-4)


@pytest.mark.parametrize(("world", "samples"), [(1, 1), (2, 3)])
def test_without_ct_a_run_is_validated_by_reprojection(
    world: int, samples: int, tmp_path: Path, tiny: RunConfig
) -> None:
    grid = GRID
    rule = SplitRule((0.0, 1.0, 0.0))
    with ArchiveWriter(str(tmp_path), grid, chest(grid), contents="radiographs", split_rule=rule) as writer:
        for seed in range(samples):
            images = np.stack([normalize(one) for one in render_drrs(thorax(seed, grid)[0], grid, chest(grid))])
            entry = Entry(f"p{seed}", f"p{seed}", "x", f"{seed:064x}", "", "none", {})
            writer.add(entry, RadiographSample(images))
    archive = Archive(str(tmp_path))
    assert len(archive.entries("val")) == samples
    results = run_ranks(world, validated, world, str(tmp_path), samples)
    found = []
    for entry in archive.entries("val"):
        views = torch.from_numpy(archive.read_array(entry, "radiographs"))[None]
        prediction = (0.5 * BackProjection(grid, chest(grid))(views)).clip(0, 1)
        one = reprojection_metrics(prediction, views, tiny.data.window, grid, chest(grid))
        found.append((float(one.psnr_db.mean()), float(one.residual.mean())))
    psnr, residual = np.mean(found, axis=0)
    for metrics in results:
        assert list(metrics) == ["val_reprojection_psnr_db", "val_reprojection_residual"]
        assert metrics["val_reprojection_psnr_db"] == pytest.approx(psnr, rel=1e-5)
        assert metrics["val_reprojection_residual"] == pytest.approx(residual, rel=1e-5)
        assert monitored(metrics) == "val_reprojection_psnr_db"
        assert format_metrics(metrics) == f"reprojection PSNR {psnr:.2f} dB, residual {residual:.3f}"
