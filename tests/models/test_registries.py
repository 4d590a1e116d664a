"""Parts that are chosen by name: the names that a configuration accepts are those of the dictionary of parts."""

import re
from dataclasses import replace

import pytest
import torch

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.serialization import from_plain, to_plain
from raylift.models.composition import Composition
from raylift.models.diffusion.diffusion_network import SamplingConfig
from raylift.models.diffusion.samplers import SAMPLERS
from raylift.models.parts.decoders import DECODERS, DecoderConfig
from raylift.models.parts.discriminators import DISCRIMINATORS, DiscriminatorConfig
from raylift.models.parts.encoders import ENCODERS, EncoderConfig
from raylift.models.parts.fusion import FUSIONS, FusionConfig
from raylift.models.parts.heads import ACTIVATIONS
from raylift.models.parts.lifting import LIFTINGS, LiftingConfig
from raylift.models.system_config import SystemConfig
from raylift.models.systems.x2ct import X2CT_GAN
from raylift.models.zoo import SYSTEMS


@pytest.mark.parametrize(
    ("settings", "field", "parts", "misspelled", "nearest"),
    [
        (FusionConfig, "kind", FUSIONS, "atention", "attention"),
        (DecoderConfig, "kind", DECODERS, "upsample", "upsampling"),
        (DecoderConfig, "output", ACTIVATIONS, "leakyrelu", "leaky_relu"),
        (SamplingConfig, "sampler", SAMPLERS, "ddmp", "ddpm"),
        (EncoderConfig, "kind", ENCODERS, "densenet", "dense"),
        (LiftingConfig, "kind", LIFTINGS, "channel", "channels"),
        (DiscriminatorConfig, "kind", DISCRIMINATORS, "patches", "patch"),
    ],
    ids=["fusions", "decoders", "activations", "samplers", "encoders", "liftings", "discriminators"],
)
def test_settings_take_every_part_of_the_dictionary_and_name_the_nearest_one(
    settings, field, parts, misspelled, nearest
):
    for name in parts:
        assert getattr(from_plain(settings, {field: name}, "x"), field) == name
    refusal = f"expected one of {', '.join(parts)}, not '{misspelled}' (did you mean {nearest}?) @ x.{field}"
    with pytest.raises(ConfigError, match=re.escape(refusal)):
        from_plain(settings, {field: misspelled}, "x")


@pytest.mark.parametrize("name", FUSIONS)
def test_every_fusion_makes_one_volume_of_two(name):
    fusion = FusionConfig(name).build(channels=4, views=2, below=4)
    volumes = [torch.rand(1, 4, 2, 2, 2) for _ in range(3)]
    assert fusion(volumes[:2], volumes[2]).shape == (1, fusion.out_channels, 2, 2, 2)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_is_found_again_by_the_name_in_its_plain_data(name):
    for system in (SYSTEMS[name].full, SYSTEMS[name].slim, SYSTEMS[name].tiny):
        assert from_plain(SystemConfig, to_plain(system), "system") == system


def test_plain_data_of_no_system_is_refused_with_the_names():
    with pytest.raises(ConfigError, match="unknown name 'x3ct': use one of psr, 3dcnn, x2ct-gan"):
        from_plain(SystemConfig, to_plain(X2CT_GAN.tiny) | {"name": "x3ct"}, "system")


def test_the_defaults_of_a_composition_are_the_published_x2ct_gan():
    assert Composition() == X2CT_GAN.full


@pytest.mark.parametrize("name", [name for name, entry in SYSTEMS.items() if entry.single_view])
def test_a_preset_for_the_single_view_differs_in_its_views_alone(name):
    entry = SYSTEMS[name]
    assert replace(entry.full, views=("frontal",)) == entry.single_view
    grid = Grid(entry.training.size, entry.spacing_mm)
    with torch.device("meta"):
        volume = entry.single_view.reconstruction_network(grid, chest(grid))(torch.empty(1, 1, grid.size, grid.size))
    assert volume.shape == (1, 1, grid.size, grid.size, grid.size)
