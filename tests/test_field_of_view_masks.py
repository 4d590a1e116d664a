"""What lies beyond the field of view of a CT that was ingested with a mask is in no loss, metric or figure."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image
from samples import thorax_image, write_image
from skimage.metrics import structural_similarity

from raylift.datasets import segmentation
from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.store import Folder
from raylift.datasets.augmentation.augmentation import Augmentation, Augmenter
from raylift.datasets.augmentation.deformation import VolumeAugmentation
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.ingest.ct import ingest_ct
from raylift.datasets.ingest.synthetic import ingest_phantoms
from raylift.datasets.intensity import Window
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.scans import reader
from raylift.datasets.scans.header_checks import DEFAULT_LIMITS
from raylift.datasets.scans.resample import archive_image, resample
from raylift.datasets.segmentation import Label
from raylift.datasets.sources import Source
from raylift.datasets.streaming.order import BatchPartition, SampleOrder
from raylift.datasets.streaming.stream import BatchStream, load_batch
from raylift.datasets.streaming.streamed_phantoms import StreamedPhantoms
from raylift.models import baselines, segmentation_metrics, weights
from raylift.models.metrics import CVAA, VOLUME, X2CT
from raylift.models.objectives.adversarial import DiscriminatorLossModule, GeneratorLossModule, ReconstructionLoss
from raylift.models.volume_network import VolumeNetwork
from raylift.platform import cli
from raylift.platform.config import DataConfig, RunConfig
from raylift.platform.evaluation.cases import read_ground_truth
from raylift.platform.presets import PRESETS
from raylift.platform.training import inputs, runs

GRID = Grid(32, 10.0)
HALF = 11
"""Voxels on either side of the middle inside the field of view: 110 mm, less than half the width of a phantom."""
KEPT = slice(16 - HALF, 16 + HALF)


def truncated(seed: int, folder: Path) -> Path:
    """A phantom in a file whose field of view cuts both flanks."""
    image: sitk.Image = archive_image(thorax(seed, GRID)[0], GRID)
    path = folder / f"patient-{seed}.nii.gz"
    sitk.WriteImage(image[KEPT], str(path))
    return path


def outside(source: Source, grid: Grid) -> np.ndarray:
    """The mask of the scan."""
    labels = resample(reader.read(source), grid, beyond_field_of_view="mask")[2]
    return labels == Label.OUTSIDE_FIELD_OF_VIEW


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("truncated")
    for seed in range(10):
        truncated(seed, folder)
    return folder


@pytest.fixture(scope="module")
def masked(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return ingested(scans, tmp_path_factory.mktemp("archives") / "masked", "mask")


def ingested(scans: Path, url: Path, beyond: str) -> Archive:
    fractions = (0.6, 0.2, 0.2)
    ingest_ct(
        [scans],
        str(url),
        GRID,
        chest(GRID),
        limits=DEFAULT_LIMITS,
        split_fractions=fractions,
        beyond_field_of_view=beyond,
    )
    return Archive(str(url))


def test_the_mask_has_the_flanks_of_slices_that_are_truncated_and_nothing_that_was_measured(scans: Path) -> None:
    (source,) = reader.find([scans / "patient-0.nii.gz"]).sources
    unmeasured = outside(source, GRID)
    whole = thorax(0, GRID)[0]
    inside = np.zeros(GRID.shape, dtype=bool)
    inside[:, :, slice(KEPT.start + 1, KEPT.stop - 1)] = True
    body = whole > -400
    # The field of view is an ellipse: a few corners of the body are beyond it.
    assert unmeasured[inside & body].mean() < 0.01
    cut = (body & ~inside).any(axis=(1, 2)) & (body & inside).any(axis=(1, 2))
    assert cut.mean() > 0.8
    assert unmeasured[cut][~inside[cut]].mean() > 0.98


def test_a_body_inside_its_field_of_view_has_no_mask_but_beyond_the_ends_of_the_scan(tmp_path: Path) -> None:
    (source,) = reader.find([write_image(thorax_image((90, 76, 60)), tmp_path / "short.nii.gz")]).sources
    unmeasured = outside(source, GRID)
    slices = unmeasured.all(axis=(1, 2))
    np.testing.assert_array_equal(np.flatnonzero(slices), [0, 1, 2, 29, 30, 31])
    assert not unmeasured[~slices].any()


def test_an_archive_with_masks_has_the_volumes_of_one_without_and_no_format_version_that_ignores_masks(
    masked: Archive, scans: Path, tmp_path: Path
) -> None:
    kept = ingested(scans, tmp_path / "kept", "keep")
    versions = []
    for archive in (kept, masked):
        folder = Folder(archive.url)
        versions.append(json.loads(folder.read(f"manifests/{folder.names('manifests')[-1]}"))["version"])
    assert versions == [3, 3]
    for one, other in zip(kept.entries(), masked.entries(), strict=True):
        first, second = kept.read(one), masked.read(other)
        np.testing.assert_array_equal(first.volume, second.volume)
        np.testing.assert_array_equal(first.radiographs, second.radiographs)
        outside = second.labels == Label.OUTSIDE_FIELD_OF_VIEW
        assert 0.1 < outside.mean() < 0.5
        np.testing.assert_array_equal(first.labels[~outside], second.labels[~outside])
        # The outermost voxels inside the field of view are mixed with the air beyond, and masked too.
        assert (first.volume[outside] < -500).mean() > 0.9
        assert (one.has_field_of_view_mask, other.has_field_of_view_mask) == (False, True)


def test_only_entries_with_voxels_outside_the_field_of_view_have_a_mask(scans: Path, tmp_path: Path) -> None:
    whole = write_image(thorax_image((90, 76, 80)), tmp_path / "whole.nii.gz")
    options = {"limits": DEFAULT_LIMITS, "beyond_field_of_view": "mask"}
    for url, sources in (("whole", [whole]), ("both", [whole, scans / "patient-0.nii.gz"])):
        ingest_ct(sources, str(tmp_path / url), GRID, chest(GRID), **options)
    alone, both = Archive(str(tmp_path / "whole")), Archive(str(tmp_path / "both"))
    for archive in (alone, both):
        for entry in archive.entries():
            share = (archive.read_array(entry, "labels") == Label.OUTSIDE_FIELD_OF_VIEW).mean()
            assert entry.record["masked_fraction"] == pytest.approx(share)
            assert entry.has_field_of_view_mask == (share > 0) == (entry.subject == "patient-0")
    assert load_batch(alone, alone.entries(), Window(), (0, 1)).labels is None
    assert load_batch(both, both.entries(), Window(), (0, 1)).labels is not None
    (old,) = (entry for entry in both.entries() if entry.has_field_of_view_mask)
    record = {name: value for name, value in old.record.items() if name != "masked_fraction"}
    assert replace(old, record=record).has_field_of_view_mask


def test_a_system_that_does_not_mask_states_so_at_the_start_of_its_training(
    masked: Archive, archive32: Path, tiny: RunConfig, ray_cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    masked_data = replace(tiny.data, archive=masked.url)
    train = len(masked.entries("train"))

    def remarks(preset: str, data: DataConfig) -> list[str]:
        run = replace(PRESETS[preset], data=data)
        archive = Archive(run.data.archive)
        objective = run.system.objective(archive.manifest.grid, archive.manifest.geometry)
        return [note for note in inputs.notes(run, objective) if "does not mask the field of view" in note]

    (remark,) = remarks("diffux2ct-tiny", masked_data)
    assert f"diffux2ct does not mask the field of view: for {train} of {train} training scans" in remark
    assert len(remarks("cyclegan-b-tiny", replace(tiny.data, unpaired=masked.url))) == 1
    for preset, data in (
        ("diffux2ct-tiny", tiny.data),
        ("x2ct-gan-tiny", masked_data),
        ("unrolled-tiny", masked_data),
        ("cyclegan-b-tiny", masked_data),
    ):
        assert remarks(preset, data) == []

    diffusion = replace(PRESETS["diffux2ct-tiny"], data=masked_data, cluster=tiny.cluster)
    run = runs.create(
        replace(diffusion, train=replace(diffusion.train, steps=1, validate_every=1)), str(tmp_path / "run")
    )
    runs.fit(run, str(tmp_path / "run"))
    printed = capfd.readouterr()
    assert (printed.out + printed.err).count(remark) == 1


class Constant(VolumeNetwork):
    """Predicts the volumes it was given."""

    def __init__(self, *predictions: torch.Tensor) -> None:
        super().__init__()
        self.predictions = torch.nn.ParameterList(predictions)

    def volumes(self, radiographs: torch.Tensor) -> list[torch.Tensor]:
        return list(self.predictions)


class Scores(torch.nn.Module):
    """A discriminator that scores every voxel by its value."""

    def forward(self, volume: torch.Tensor, radiographs: torch.Tensor) -> torch.Tensor:
        return volume


EVERY_TERM = ReconstructionLoss(
    mse_weight=1.0,
    l1_weight=1.0,
    projection_weight=1.0,
    cone_projection_weight=1.0,
    ssim_weight=1.0,
    lung_weight=1.0,
    deep_supervision_weight=1.0,
)


def test_no_term_of_the_loss_depends_on_a_prediction_outside_the_field_of_view(masked: Archive) -> None:
    batch = load_batch(masked, masked.entries("train")[:2], Window(), (0, 1))
    outside = ~batch.inside
    assert outside.any()
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(batch.volume.shape, generator=generator)
    exact_inside = torch.where(outside, noise, batch.volume)
    loss, terms, outputs = GeneratorLossModule(Constant(exact_inside, exact_inside), None, EVERY_TERM)(batch, {})
    assert set(terms) > {"voxel_mse", "voxel_l1", "ssim_loss", "projection_l1", "cone_projection_l1", "lung_mse"}
    for name, value in terms.items():
        assert abs(float(value)) < 1e-6, name
    assert abs(loss.item()) < 1e-6
    torch.testing.assert_close(outputs["reconstruction"], batch.volume)

    losses, gradients = [], []
    for beyond in (0.0, 1.0):
        network = Constant(torch.where(outside, beyond, noise), torch.where(outside, beyond, noise))
        torch.manual_seed(1)
        loss, _, outputs = GeneratorLossModule(network, Scores(), EVERY_TERM)(batch, {})
        loss.backward()
        discriminated = DiscriminatorLossModule(Scores(), EVERY_TERM)(batch, outputs)[0]
        losses.append([loss.item(), discriminated.item()])
        gradients.append(network.predictions[0].grad)
    assert losses[0] == losses[1]
    assert losses[0][0] > 0.01
    for gradient in gradients:
        assert gradient[outside].abs().max() == 0
        assert gradient[~outside].abs().min() > 0


def test_the_mask_is_deformed_with_the_volume_and_phantoms_of_the_stream_have_none(masked: Archive) -> None:
    entries = masked.entries("train")
    phantoms = 3
    augmentation = Augmentation(enabled=True, volume=VolumeAugmentation(probability=1.0))
    geometry = masked.manifest.geometry
    stream = BatchStream(
        masked,
        entries,
        SampleOrder(len(entries) + phantoms, 0),
        BatchPartition(0, 1, len(entries) + phantoms, 1),
        Window(),
        augmenter=Augmenter(augmentation, 0, GRID, geometry, torch.device("cpu")),
        phantoms=StreamedPhantoms(phantoms, 0, GRID, geometry),
    )
    (micro,) = next(islice(stream, 1))
    stored = {entry.id: masked.read_array(entry, "labels") for entry in entries}
    seen = 0
    for name, inside, volume in zip(micro.ids, micro.inside[:, 0].numpy(), micro.volume[:, 0].numpy(), strict=True):
        if name.startswith("phantom-"):
            assert inside.all()
            continue
        before = stored[name] != Label.OUTSIDE_FIELD_OF_VIEW
        assert 0.1 < (~inside).mean() < 0.6
        assert (before != inside).mean() > 0.01, "nothing was deformed"
        # The file's air, apart from the border of the mask.
        assert (volume[~inside] < 0.25).mean() > 0.8
        seen += 1
    assert seen == len(entries)


def test_archives_without_masks_are_read_without_labels(tmp_path: Path) -> None:
    ingest_phantoms(str(tmp_path), GRID, chest(GRID), count=2, seed=1)
    archive = Archive(str(tmp_path))
    batch = load_batch(archive, archive.entries(), Window(), (0, 1))
    assert batch.labels is None
    assert batch.inside.all()
    other = torch.rand(batch.volume.shape)
    assert batch.fill_outside(other) is other


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A prediction, a ground truth that is NaN outside a box, and the mask of the box."""
    generator = np.random.default_rng(0)
    ground_truth = generator.uniform(-1000, 1400, (24, 22, 26)).astype(np.float32)
    prediction = ground_truth + generator.normal(0, 100, ground_truth.shape).astype(np.float32)
    inside = np.zeros(ground_truth.shape, dtype=bool)
    inside[4:, 3:20, 5:21] = True
    return prediction, np.where(inside, ground_truth, np.nan), inside


def test_metrics_of_a_masked_volume_are_those_computed_by_hand_inside(pair) -> None:
    prediction, ground_truth, inside = pair
    values = VOLUME.evaluate(prediction, ground_truth)
    units = [((volume.astype(np.float64) + 1024) / 2500).clip(0, 1) for volume in (prediction, ground_truth)]
    error = (units[0] - units[1])[inside]
    assert values["mse"] == pytest.approx(np.mean(error**2))
    assert values["psnr_db"] == pytest.approx(-10 * np.log10(np.mean(error**2)))
    assert values["mae_hu"] == pytest.approx(np.abs(error).mean() * 2500)
    one, other = (unit[inside] for unit in units)
    assert values["cosine_similarity"] == pytest.approx(one @ other / np.sqrt((one @ one) * (other @ other)))
    air = [np.where(inside, unit, 0.0) for unit in units]
    windows = structural_similarity(
        air[1], air[0], data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )[1]
    centers = np.zeros_like(inside)
    centers[5:-5, 5:-5, 5:-5] = True
    assert values["ssim"] == pytest.approx(windows[centers & inside].mean())

    scaled = [(unit * 2500).astype(np.int32).astype(np.float64) for unit in air]
    slices = [
        np.mean(np.square(scaled[0].take(k, axis) - scaled[1].take(k, axis))[inside.take(k, axis)])
        for axis in range(3)
        for k in range(inside.shape[axis])
        if inside.take(k, axis).any()
    ]
    by_axis = np.split(20 * np.log10(4095 / np.sqrt(slices)), np.cumsum([20, 17]))
    assert X2CT.evaluate(prediction, ground_truth)["psnr_slices_db"] == pytest.approx(np.mean([*map(np.mean, by_axis)]))


def test_no_metric_depends_on_a_prediction_outside(pair) -> None:
    prediction, ground_truth, inside = pair
    other = np.where(inside, prediction, 3000).astype(np.float32)
    for protocol in (VOLUME, X2CT, CVAA):
        assert protocol.evaluate(prediction, ground_truth) == protocol.evaluate(other, ground_truth)
    hu = thorax(2, GRID)[0].astype(np.float32)
    cut = hu.copy()
    cut[:, :, :6] = np.nan
    noisy = np.where(np.isnan(cut), 40, hu).astype(np.float32)
    values = segmentation_metrics.compare(noisy, cut, (GRID.spacing_mm,) * 3)
    assert (values["lung_dice"], values["lung_volume_error_ml"]) == (1.0, 0.0)


def test_lungs_are_compared_where_the_field_of_view_excludes_the_chest_wall(tmp_path: Path) -> None:
    grid = Grid(64, 5.0)
    image: sitk.Image = archive_image(thorax(0, grid)[0], grid)
    sitk.WriteImage(image[5:-5], str(tmp_path / "narrow.nii.gz"))
    (source,) = reader.find([tmp_path / "narrow.nii.gz"]).sources
    hu, unmeasured = resample(reader.read(source), grid)[0], outside(source, grid)
    lung = segmentation.lungs(hu, grid.spacing_mm) & ~unmeasured
    ground_truth = np.where(unmeasured, np.nan, hu).astype(np.float32)
    milliliters = grid.spacing_mm**3 / 1000
    lung_ml = lung.sum() * milliliters
    assert lung_ml > 1900
    same = segmentation_metrics.compare(hu.astype(np.float32), ground_truth, (grid.spacing_mm,) * 3)
    assert same["lung_dice"] == 1.0
    assert same["lung_volume_ml"] == pytest.approx(lung_ml, rel=0.02)
    prediction = hu.astype(np.float32)
    prediction[:, :, :32] = 40
    values = segmentation_metrics.compare(prediction, ground_truth, (grid.spacing_mm,) * 3)
    kept_ml = lung[:, :, 32:].sum() * milliliters
    assert values["lung_volume_ml"] == pytest.approx(kept_ml, rel=0.03)
    assert values["lung_volume_error_ml"] == pytest.approx(kept_ml - lung_ml, rel=0.03)
    assert values["lung_dice"] == pytest.approx(2 * kept_ml / (kept_ml + lung_ml), abs=0.02)


def test_baselines_are_fitted_inside(masked: Archive) -> None:
    entries = masked.entries("train")
    fitted = baselines.fit((load_batch(masked, [e], Window(), (0, 1)) for e in entries), GRID, masked.manifest.geometry)
    ground_truth = np.stack([read_ground_truth(masked, entry) for entry in entries])
    seen = ~np.isnan(ground_truth)
    expected = np.where(seen, Window().to_unit(ground_truth), 0).sum(axis=0) / seen.sum(axis=0).clip(1)
    np.testing.assert_allclose(fitted.mean[0, 0].numpy(), expected, atol=1e-6)
    assert (seen.sum(axis=0) == 0).any()


def test_a_run_on_truncated_phantoms_is_trained_and_evaluated_inside_their_field_of_view(
    masked: Archive, tiny: RunConfig, ray_cluster, tmp_path: Path
) -> None:
    augmentation = Augmentation(enabled=True)
    data = replace(tiny.data, archive=masked.url, augmentation=augmentation, phantoms_per_epoch=4)
    run = runs.create(replace(tiny, data=data), str(tmp_path / "run"))
    runs.fit(run, str(tmp_path / "run"))
    checkpoint = tmp_path / "run/checkpoints/step-00000008"
    model = weights.load(checkpoint)
    measured = []
    for entry in masked.entries("val")[: run.train.validation_samples]:
        normalization = model.description.normalization
        images = load_batch(masked, [entry], Window(), (0, 1), normalization=normalization).radiographs
        prediction = Window().to_hu(model.network(images))[0, 0].numpy()
        measured.append(VOLUME.evaluate(prediction, read_ground_truth(masked, entry)))
    validated = json.loads((checkpoint / "state.json").read_text())["metrics"]
    for name in ("psnr_db", "mae_hu"):
        assert validated[f"val_{name}"] == pytest.approx(np.mean([values[name] for values in measured]), rel=1e-4)
    report = tmp_path / "report"
    command = ["evaluate", str(tmp_path / "run"), "--archive", masked.url, "--output", str(report)]
    assert cli.main(command) == 0
    results = json.loads((report / "metrics.json").read_text())
    entries = masked.entries("test")
    assert len(results["cases"]) == len(entries) > 0
    assert sum("outside the field of view are in no metric and blank in figures" in n for n in results["notes"]) == len(
        entries
    )
    assert "blank in figures" in (report / "report.md").read_text()
    entry = entries[0]
    ground_truth = Window().to_unit(read_ground_truth(masked, entry))
    training = masked.entries("train")
    fitted = baselines.fit(
        (load_batch(masked, [e], Window(), (0, 1)) for e in training), GRID, masked.manifest.geometry
    )
    error = fitted.mean[0, 0].numpy() - ground_truth
    psnr = -10 * np.log10(np.nanmean(error.astype(np.float64) ** 2))
    assert results["cases"][entry.id]["mean volume"]["volume"]["psnr_db"] == pytest.approx(psnr, abs=1e-3)
    figure = np.asarray(Image.open(report / "figures" / f"{entry.id}-slices.png").convert("L")).astype(int)
    assert (figure == 255).mean() > 0.3


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"beyond_field_of_view": "mask"}),
        ({"beyond_field_of_view": "mask"}, {}),
        ({"beyond_field_of_view": "mask"}, {"beyond_field_of_view": "extend"}),
        ({}, {"keep_table": True}),
        ({"keep_table": True}, {}),
    ],
)
def test_a_scan_that_the_archive_has_with_another_option_is_reported(first: dict, second: dict, tmp_path: Path) -> None:
    scan, url = truncated(0, tmp_path), str(tmp_path / "archive")
    reports = [
        ingest_ct([scan], url, GRID, chest(GRID), limits=DEFAULT_LIMITS, **choice).lines()
        for choice in (first, first, second)
    ]
    assert [sum("another --beyond-field-of-view or --keep-table" in line for line in lines) for lines in reports] == [
        0,
        0,
        1,
    ]
    assert "patient-0.nii.gz. To apply the requested option, ingest into another archive" in reports[2][-1]
