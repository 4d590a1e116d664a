"""Whole runs by name. A preset is a function that returns a configuration; a variant replaces parts of another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from raylift.datasets.errors import ConfigError
from raylift.platform.config import RunConfig, from_yaml
from raylift.platform.presets import compositions, diffusion, radiographs, refiners

PRESETS: dict[str, Callable[[], RunConfig]] = {
    "psr": compositions.psr_frontal,
    "3dcnn": compositions.cnn3d_biplanar,
    "x2ct-gan": compositions.x2ct_gan_biplanar,
    "x2ct-gan-single": compositions.x2ct_gan_single,
    "x2ct-cnn": compositions.x2ct_cnn_biplanar,
    "cvaa-gan": compositions.cvaa_gan_biplanar,
    "duolift-gan": compositions.duolift_gan_biplanar,
    "duolift-gan-single": compositions.duolift_gan_single,
    "duolift-cnn": compositions.duolift_cnn_biplanar,
    "x-recon": compositions.x_recon_biplanar,
    "trct-gan": compositions.trct_gan_biplanar,
    "diffux2ct": diffusion.diffux2ct_biplanar,
    "latent-diffusion": diffusion.latent_diffusion_biplanar,
    "refiner": refiners.refiner,
    "u-x2ctgan": radiographs.u_x2ctgan_biplanar,
    "cyclegan-b": radiographs.cyclegan_biplanar,
    "cyclegan-f": radiographs.cyclegan_frontal,
    "cgan-128": radiographs.cgan_128_biplanar,
    "psr-slim": compositions.psr_slim,
    "3dcnn-slim": compositions.cnn3d_slim,
    "x2ct-gan-slim": compositions.x2ct_gan_slim,
    "x2ct-gan-single-slim": compositions.x2ct_gan_single_slim,
    "x2ct-cnn-slim": compositions.x2ct_cnn_slim,
    "cvaa-gan-slim": compositions.cvaa_gan_slim,
    "duolift-gan-slim": compositions.duolift_gan_slim,
    "duolift-cnn-slim": compositions.duolift_cnn_slim,
    "x-recon-slim": compositions.x_recon_slim,
    "trct-gan-slim": compositions.trct_gan_slim,
    "diffux2ct-slim": diffusion.diffux2ct_slim,
    "latent-diffusion-slim": diffusion.latent_diffusion_slim,
    "refiner-slim": refiners.refiner_slim,
    "u-x2ctgan-slim": radiographs.u_x2ctgan_slim,
    "cyclegan-b-slim": radiographs.cyclegan_b_slim,
    "cyclegan-f-slim": radiographs.cyclegan_f_slim,
    "cgan-128-slim": radiographs.cgan_128_slim,
    "x2ct-gan-tiny": compositions.x2ct_gan_tiny,
    "diffux2ct-tiny": diffusion.diffux2ct_tiny,
    "latent-diffusion-tiny": diffusion.latent_diffusion_tiny,
    "refiner-tiny": refiners.refiner_tiny,
}


def named_run(name: str) -> RunConfig:
    """A preset, or the configuration in a YAML file.

    Raises:
        ConfigError: neither.
    """
    if name in PRESETS:
        return PRESETS[name]()
    if name.endswith((".yaml", ".yml")):
        return from_yaml(Path(name).read_text(encoding="utf-8"), name)
    raise ConfigError(f"no preset '{name}': use one of {', '.join(PRESETS)}, or a YAML file")


def listing() -> str:
    """A line for each preset."""
    width = max(map(len, PRESETS))
    return "presets:\n" + "\n".join(
        f"  {name:<{width}}  {(make.__doc__ or '').splitlines()[0]}" for name, make in PRESETS.items()
    )
