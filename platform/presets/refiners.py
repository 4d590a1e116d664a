"""Runs of the diffusion refiner: for a GPU, and slim for two CPU cores. They want `--system.base-model`."""

from __future__ import annotations

from dataclasses import replace

from raylift.models.diffusion.denoiser import DenoiserConfig
from raylift.models.systems.refiner import Refiner
from raylift.models.systems.slim import slim, tiny
from raylift.models.systems.x2ct import x2ct_gan
from raylift.platform.config import OptimizerConfig, RunConfig
from raylift.platform.presets.budgets import on_gpu, on_two_cores

ADAM = OptimizerConfig(rate=2e-4, beta_1=0.9, beta_2=0.999)
SLIM_DENOISER = DenoiserConfig(channels=(32, 48, 64), blocks=1, levels_without_attention=3, patch=2)


def refiner() -> RunConfig:
    """Diffusion refiner of any trained model at 128^3 (--system.base-model); in bf16 with checkpointing."""
    run = on_gpu(Refiner(checkpointing="all"))
    engine = replace(run.engine, precision="bf16", gradient_clip=1.0)
    return replace(run, optimizer=ADAM, engine=engine, train=replace(run.train, steps=100_000))


def refiner_slim() -> RunConfig:
    """Diffusion refiner with 1.0 million parameters at 64^3, for two CPU cores (--system.base-model)."""
    run = on_two_cores(Refiner(base=slim(x2ct_gan()), denoiser=SLIM_DENOISER))
    return replace(run, optimizer=replace(ADAM, rate=1e-3))


def refiner_tiny() -> RunConfig:
    """The refiner of the tiny X2CT-GAN at 32^3: seconds a run, for tests."""
    run = refiner_slim()
    system = Refiner(
        base=tiny(x2ct_gan()), denoiser=DenoiserConfig(channels=(8, 16), blocks=1, levels_without_attention=2, patch=2)
    )
    train = replace(run.train, steps=20, batch=4, validate_every=10, log_every=5, validation_samples=2)
    return replace(run, system=system, data=replace(run.data, size=32), train=train)
