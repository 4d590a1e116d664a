"""Trivial baselines."""

import torch

from raylift.datasets.batch import Batch
from raylift.datasets.geometry import Grid, chest, parallel
from raylift.models import baselines

GRID = Grid(16, 10.0)


def batches(count=3):
    torch.manual_seed(0)
    return [Batch(torch.rand(1, 1, 16, 16, 16), torch.rand(1, 2, 16, 16)) for _ in range(count)]


def test_the_mean_volume_is_the_mean_whatever_the_radiographs():
    data = batches()
    mean = baselines.fit(data, GRID, chest(GRID)).predictors(GRID, chest(GRID))["mean volume"]
    expected = torch.stack([batch.volume[0] for batch in data]).mean(dim=0)
    torch.testing.assert_close(mean(torch.rand(5, 2, 16, 16)), expected.expand(5, -1, -1, -1, -1))


def test_back_projection_recovers_a_volume_that_is_a_back_projection():
    # With parallel rays, the volume whose voxels are the mean of their two pixels is back-projection itself.
    geometry = parallel(GRID)
    data = [
        Batch(baselines.BackProjection(GRID, geometry).backproject(batch.radiographs) * 0.5 + 0.2, batch.radiographs)
        for batch in batches()
    ]
    fitted = baselines.fit(data, GRID, geometry).predictors(GRID, geometry)["back-projection"]
    assert abs(fitted.scale - 0.5) < 1e-4
    assert abs(fitted.offset - 0.2) < 1e-4
    torch.testing.assert_close(fitted(data[0].radiographs), data[0].volume, atol=1e-4, rtol=0)


def test_no_other_scale_or_offset_fits_the_training_volumes_better():
    plain = baselines.BackProjection(GRID, chest(GRID))
    data = [Batch(plain.backproject(b.radiographs) * 0.5 + 0.1 + 0.2 * b.volume, b.radiographs) for b in batches()]
    fitted = baselines.fit(data, GRID, chest(GRID))

    def error(scale, offset):
        return sum(
            float((plain.backproject(b.radiographs) * scale + offset - b.volume).double().square().mean()) for b in data
        )

    best = error(fitted.scale, fitted.offset)
    for scale, offset in ((1.01, 0.0), (0.99, 0.0), (1.0, 0.01), (1.0, -0.01)):
        assert error(fitted.scale * scale, fitted.offset + offset) > best
