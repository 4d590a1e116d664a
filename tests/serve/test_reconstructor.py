from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Grid
from raylift.datasets.radiographs.decoding import read
from raylift.serve.reconstructor import Reconstructor
from raylift.serve.volume_formats import nifti


def inputs(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(3).random((count, 2, 32, 32), dtype=np.float32))


def opened(data: bytes, folder: Path) -> sitk.Image:
    path = folder / "volume.nii.gz"
    path.write_bytes(data)
    return sitk.ReadImage(str(path))


def test_a_batch_of_four_equals_four_batches_of_one(reconstructor: Reconstructor) -> None:
    together = [one.hu for one in reconstructor.reconstruct(inputs(4))]
    alone = [reconstructor.reconstruct([one])[0].hu for one in inputs(4)]
    assert np.abs(np.subtract(together, alone, dtype=np.int32)).max() <= 1
    assert np.abs(np.subtract(alone[0], alone[1], dtype=np.int32)).mean() > 10


def test_values_are_clipped_to_the_window_of_the_model(reconstructor: Reconstructor) -> None:
    hu = np.stack([one.hu for one in reconstructor.reconstruct(inputs(2))])
    assert hu.dtype == np.int16
    assert (hu.min(), hu.max()) == (-1024, 1476)


def test_the_fit_lowers_the_residual_of_each_item_of_a_batch_independently(
    model_folder: Path, radiographs: dict[str, bytes]
) -> None:
    fitting = Reconstructor.load(str(model_folder), consistency_steps=3)
    plain = fitting.prepare({view: read(data, view, invert="no").pixels for view, data in radiographs.items()})
    inputs = [plain, plain[..., ::-1].copy(), np.sqrt(plain)]
    together = fitting.reconstruct(inputs)
    alone = [fitting.reconstruct([one])[0] for one in inputs]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.subtract(one.hu, other.hu, dtype=np.int32)).max() <= 1
        assert list(one.residuals) == ["frontal", "lateral"]
        for view, (before, after) in one.residuals.items():
            assert after < before
            assert (before, after) == pytest.approx(other.residuals[view], abs=1e-4)


def test_without_a_fit_there_is_no_residual(reconstructor: Reconstructor) -> None:
    assert reconstructor.reconstruct(inputs(1))[0].residuals == {}


def test_negative_steps_of_the_fit_are_refused(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="a data-consistency fit of -2 steps"):
        Reconstructor.load(str(model_folder), consistency_steps=-2)


def test_views_that_are_not_those_of_the_model_are_refused(reconstructor: Reconstructor) -> None:
    image = np.random.default_rng(0).random((40, 40), dtype=np.float32)
    with pytest.raises(ConfigError, match=r"this model requires frontal and lateral, got frontal$"):
        reconstructor.prepare({"frontal": image})
    with pytest.raises(ConfigError, match="got none"):
        reconstructor.prepare({})
    with pytest.raises(ConfigError, match="oblique"):
        reconstructor.prepare({"frontal": image, "lateral": image, "oblique": image})


def test_radiographs_are_stacked_in_the_order_of_the_models_views(reconstructor: Reconstructor) -> None:
    rng = np.random.default_rng(0)
    images = {view: rng.random((40, 40), dtype=np.float32) for view in ("frontal", "lateral")}
    reordered = reconstructor.prepare(dict(reversed(images.items())))
    np.testing.assert_array_equal(reordered, reconstructor.prepare(images))
    assert reordered.shape == (2, 32, 32)


def test_a_nifti_file_has_every_value_at_its_patient_coordinates(tmp_path: Path) -> None:
    hu = np.random.default_rng(1).integers(-1024, 1477, (8, 8, 8)).astype(np.int16)
    image = opened(nifti(hu, Grid(8, 2.5), "raylift 0123, research only"), tmp_path)
    assert image.GetPixelID() == sitk.sitkInt16
    assert image.GetSize() == (8, 8, 8)
    assert image.GetSpacing() == (2.5, 2.5, 2.5)
    np.testing.assert_allclose(image.GetDirection(), np.eye(3).ravel())
    for d, h, w in ((0, 0, 0), (7, 0, 3), (2, 5, 7)):
        # Volume order: from superior, from anterior, from the right; LPS: to the left, posterior, superior.
        point = ((w - 3.5) * 2.5, (h - 3.5) * 2.5, (3.5 - d) * 2.5)
        assert image[image.TransformPhysicalPointToIndex(point)] == hu[d, h, w]


def test_the_header_of_a_nifti_file_has_the_digest_of_the_weights(tmp_path: Path) -> None:
    image = opened(nifti(np.zeros((8, 8, 8), np.int16), Grid(8, 2.5), "raylift 0123, research only"), tmp_path)
    assert image.GetMetaData("descrip") == "raylift 0123, research only"
