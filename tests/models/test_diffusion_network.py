"""Sampling settings of diffusion networks, and their refusal by deterministic ones."""

import pytest
import torch

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Grid, chest
from raylift.models.diffusion.diffusion_network import SamplingConfig, SamplingFlags
from raylift.models.inference import RunningStatistics
from raylift.models.systems.x2ct import X2CT_GAN

GRID = Grid(32, 10.0)


def test_running_mean_and_std_equal_those_of_all_volumes():
    # With this offset a sum of squares in fp32 loses most of its digits.
    volumes = 1000 + torch.randn(5, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    statistics = RunningStatistics()
    for volume in volumes:
        statistics.add(volume)
    torch.testing.assert_close(statistics.mean, volumes.mean(dim=0))
    torch.testing.assert_close(statistics.std, volumes.std(dim=0), rtol=1e-3, atol=1e-4)


def test_a_single_volume_has_no_std():
    statistics = RunningStatistics()
    statistics.add(torch.ones(1, 2, 2, 2))
    assert statistics.std is None
    assert torch.equal(statistics.mean, torch.ones(1, 2, 2, 2))


@pytest.mark.parametrize(
    ("flags", "samples", "message"),
    [
        (SamplingFlags(steps=4), 1, "is deterministic: leave out --steps"),
        (SamplingFlags(sampler="ddim", seed=0), 3, "--sampler, --seed, --samples"),
        (SamplingFlags(), 0, "0 samples: give 1 or more"),
    ],
)
def test_a_deterministic_network_refuses_sampling_flags(flags, samples, message):
    network = X2CT_GAN.tiny.reconstruction_network(GRID, chest(GRID))
    with pytest.raises(ConfigError, match=message):
        flags.resolve(network, samples)
    assert SamplingFlags().resolve(network) is None


def test_zero_sampling_steps_are_refused():
    with pytest.raises(ConfigError, match="0 sampling steps"):
        SamplingConfig(steps=0)
