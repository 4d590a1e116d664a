"""Runs of the diffusion systems: for a GPU, and slim for two CPU cores."""

from __future__ import annotations

from dataclasses import replace

from raylift.models.diffusion.autoencoder import AutoencoderConfig
from raylift.models.diffusion.denoiser import DenoiserConfig
from raylift.models.diffusion.noise_schedule import NoiseSchedulerConfig
from raylift.models.diffusion.triplane import TriPlaneConfig
from raylift.models.generative import SamplingConfig
from raylift.models.parts.encoders import EncoderConfig
from raylift.models.systems.diffux2ct import DiffuX2CT
from raylift.models.systems.latent_diffusion import LatentDiffusion
from raylift.platform.config import OptimizerConfig, RunConfig
from raylift.platform.presets.budgets import on_gpu, on_two_cores

ADAM = OptimizerConfig(rate=2e-4, beta_1=0.9, beta_2=0.999)
"""Of the public re-implementation of Diff2CT; DiffuX2CT's is not published."""
SLIM_PLANES = TriPlaneConfig(
    EncoderConfig(stem=16, growth=8, bottleneck=32, layers=(2, 3, 3)),
    channels=16,
    hidden=32,
    layers=1,
    condition_channels=16,
)
SLIM_DENOISER = DenoiserConfig(channels=(32, 48, 64), blocks=1, levels_without_attention=1, patch=2)
FAST = NoiseSchedulerConfig(beta_schedule="cosine", prediction_type="sample")
"""What learns in minutes; noise alone takes many times as long to say where the patient is."""

FEW = SamplingConfig(steps=2)
"""Measured on trained slim models: of 1 to 32 steps the fewest within 0.1 dB of the best, for every sampler."""


def diffux2ct_biplanar() -> RunConfig:
    """DiffuX2CT at 128^3: noise prediction, projection loss of 1/T; in bf16 with checkpointing."""
    return _at_length(on_gpu(DiffuX2CT(checkpointing="all")))


def latent_diffusion_biplanar() -> RunConfig:
    """DiffuX2CT's condition on the 32^3 latents of 128^3 volumes, autoencoder and denoiser trained together; bf16."""
    return _at_length(on_gpu(LatentDiffusion(checkpointing="all")))


def diffux2ct_slim() -> RunConfig:
    """DiffuX2CT with 1.4 million parameters at 64^3, which tells the volume instead of the noise, for two CPU cores."""
    run = on_two_cores(DiffuX2CT(triplane=SLIM_PLANES, denoiser=SLIM_DENOISER, scheduler=FAST, sampling=FEW))
    return replace(run, optimizer=replace(ADAM, rate=1e-3))


def latent_diffusion_slim() -> RunConfig:
    """Latent DiffuX2CT with 1.6 million parameters at 64^3, its latents at 16^3, for two CPU cores."""
    system = LatentDiffusion(
        triplane=SLIM_PLANES,
        denoiser=replace(SLIM_DENOISER, patch=1),
        scheduler=FAST,
        sampling=FEW,
        autoencoder=AutoencoderConfig(channels=(16, 32), latent_channels=4),
    )
    run = on_two_cores(system)
    return replace(run, optimizer=replace(ADAM, rate=1e-3))


def diffux2ct_tiny() -> RunConfig:
    """The slim DiffuX2CT at 32^3: seconds a run, for tests and for trying a cluster."""
    return _tiny(diffux2ct_slim())


def latent_diffusion_tiny() -> RunConfig:
    """The slim latent DiffuX2CT at 32^3, its latents at 8^3."""
    return _tiny(latent_diffusion_slim())


def _at_length(run: RunConfig) -> RunConfig:
    return replace(
        run,
        optimizer=ADAM,
        engine=replace(run.engine, precision="bf16", gradient_clip=1.0),
        train=replace(run.train, steps=100_000),
    )


def _tiny(run: RunConfig) -> RunConfig:
    train = replace(run.train, steps=20, batch=4, validate_every=10, log_every=5, validation_samples=2)
    return replace(run, data=replace(run.data, size=32), train=train)
