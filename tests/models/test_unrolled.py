"""raylift's own system: any views, projections that count, and volumes it can learn."""

from dataclasses import replace

import pytest
import torch

from raylift.datasets.batch import Batch
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Grid, View, chest
from raylift.datasets.intensity import Window, hu_to_attenuation
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import project
from raylift.models.systems.unrolled import Unrolled

GRID = Grid(16, 20.0)
TINY = Unrolled(iterations=2, image_channels=(8, 16), lifted_channels=(8, 8), volume_channels=(8, 16))


def geometry_of(count: int):
    views = tuple(View(f"v{k}", azimuth_deg=180.0 * k / count) for k in range(count))
    return replace(chest(GRID), views=views), tuple(view.name for view in views)


def batch_of(seeds: range, geometry) -> Batch:
    window = Window()
    hu = torch.stack([torch.from_numpy(thorax(seed, GRID)[0]).float()[None] for seed in seeds])
    views = torch.cat(
        [project(hu_to_attenuation(hu), GRID.spacing_mm, geometry, view) for view in geometry.views], dim=1
    )
    low, high = views.amin(dim=(2, 3), keepdim=True), views.amax(dim=(2, 3), keepdim=True)
    return Batch(window.to_unit(hu), (views - low) / (high - low))


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_the_same_weights_take_any_number_of_views_in_any_pose(count):
    torch.manual_seed(0)
    two, names = geometry_of(2)
    weights = replace(TINY, views=names).reconstruction_network(GRID, two).state_dict()
    geometry, names = geometry_of(count)
    network = replace(TINY, views=names).reconstruction_network(GRID, geometry)
    network.load_state_dict(weights, strict=True)
    views = batch_of(range(1), geometry).radiographs
    with torch.no_grad():
        assert network(views).shape == (1, 1, 16, 16, 16)


def test_every_parameter_gets_a_gradient_and_two_volumes_are_learned():
    torch.manual_seed(0)
    geometry, names = geometry_of(2)
    objective = replace(TINY, views=names).objective(GRID, geometry)
    (loss_module,) = objective.loss_modules.values()
    batch = batch_of(range(2), geometry)
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=3e-3)
    errors = []
    for step in range(90):
        optimizer.zero_grad()
        loss, logs, _ = loss_module(batch, {})
        loss.backward()
        if step == 20:
            without = [
                name for name, value in loss_module.named_parameters() if value.grad is None or not value.grad.any()
            ]
            assert not without
        errors.append(float(logs["voxel_mse"]))
        optimizer.step()
    assert errors[-1] < 0.1 * errors[0]


def test_a_radiograph_of_other_gain_and_offset_is_matched_before_the_residual():
    """What is back-projected vanishes where the volume explains the radiographs, whatever their scale."""
    geometry, names = geometry_of(2)
    network = replace(TINY, views=names).reconstruction_network(GRID, geometry)
    batch = batch_of(range(1), geometry)
    features = torch.zeros(2, 8, 16, 16)
    true = network._residual(batch.volume, 0.2 + 0.5 * batch.radiographs, features)[:, :1]
    other = network._residual(batch_of(range(5, 6), geometry).volume, 0.2 + 0.5 * batch.radiographs, features)[:, :1]
    assert true.abs().mean() < 0.02 * other.abs().mean()


def test_the_window_of_the_data_must_be_that_of_the_network():
    geometry, names = geometry_of(2)
    with pytest.raises(ConfigError, match="window"):
        replace(TINY, views=names).objective(GRID, geometry, Window(-1000, 1000))


@pytest.mark.parametrize("changed", [{"iterations": 0}, {"volume_channels": (8,)}, {"volume_channels": ()}])
def test_settings_that_make_no_network_are_refused(changed):
    with pytest.raises(ConfigError):
        replace(TINY, **changed)


def test_a_size_that_cannot_be_halved_is_refused():
    with pytest.raises(ConfigError, match="multiple"):
        Unrolled().reconstruction_network(Grid(20, 5.0), chest(Grid(20, 5.0)))
