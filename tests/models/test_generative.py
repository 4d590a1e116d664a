"""What may be asked of a network that draws, and of one that does not."""

import pytest
import torch

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Grid, chest
from raylift.models.generative import RunningStatistics, SamplingConfig, SamplingFlags
from raylift.models.systems.slim import tiny
from raylift.models.systems.x2ct import x2ct_gan

GRID = Grid(32, 10.0)


def test_mean_and_spread_of_volumes_one_after_another_are_those_of_all_at_once():
    # An offset that would cost a sum of squares in single precision most of its digits.
    volumes = 1000 + torch.randn(5, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    spread = RunningStatistics()
    for volume in volumes:
        spread.add(volume)
    torch.testing.assert_close(spread.mean, volumes.mean(dim=0))
    torch.testing.assert_close(spread.std, volumes.std(dim=0), rtol=1e-3, atol=1e-4)


def test_a_single_volume_has_no_spread():
    spread = RunningStatistics()
    spread.add(torch.ones(1, 2, 2, 2))
    assert spread.std is None
    assert torch.equal(spread.mean, torch.ones(1, 2, 2, 2))


@pytest.mark.parametrize(
    ("flags", "samples", "message"),
    [
        (SamplingFlags(steps=4), 1, "is deterministic, so it has no use for --steps: leave"),
        (SamplingFlags(sampler="ddim", seed=0), 3, "--sampler, --seed, --samples: leave"),
        (SamplingFlags(), 0, "0 samples: give 1 or more"),
    ],
)
def test_a_network_that_computes_its_volume_refuses_what_is_asked_of_draws(flags, samples, message):
    network = tiny(x2ct_gan()).reconstructor(GRID, chest(GRID))
    with pytest.raises(ConfigError, match=message):
        flags.resolve(network, samples)
    assert SamplingFlags().resolve(network) is None


def test_no_step_is_no_draw():
    with pytest.raises(ConfigError, match="0 sampling steps"):
        SamplingConfig(steps=0)
