"""Runs of the systems that learn from radiographs alone: as published for a GPU, and slim for two CPU cores."""

from __future__ import annotations

from dataclasses import replace

from raylift.models.systems.cgan import cgan_128
from raylift.models.systems.cyclegan import cyclegan_b, cyclegan_f
from raylift.models.systems.slim_radiographs import slim
from raylift.models.systems.u_x2ct import u_x2ctgan
from raylift.models.zoo import System
from raylift.platform.config import OptimizerConfig, RunConfig
from raylift.platform.presets.budgets import on_gpu, on_two_cores

U_X2CTGAN_EPOCH = 212
"""Steps: 3,388 pairs in batches of 16, the last of them short."""
CYCLEGAN_EPOCH = 180
"""Steps: 2,873 pairs in batches of 16."""
CGAN_EPOCH = 719
"""Steps: 2,873 pairs in batches of 4."""


def u_x2ctgan_biplanar() -> RunConfig:
    """u-X2CTGAN: batch 16 in four parts, rate 1e-4, L2 of 1e-4 on all parameters, 50 epochs of 3,388 pairs."""
    # Adam's decay adds itself times a weight to the gradient: twice what stands before the sum of squares.
    run = _constant(on_gpu(u_x2ctgan()), OptimizerConfig(1e-4, beta_2=0.999, weight_decay=2e-4))
    return replace(
        run,
        engine=replace(run.engine, gradient_accumulation=4),
        train=replace(run.train, batch=16, steps=50 * U_X2CTGAN_EPOCH),
    )


def cyclegan_biplanar() -> RunConfig:
    """CycleGAN-B: 64^3, batch 16, rate 1e-5, gradients clipped at 1, 40 epochs of 2,873 pairs."""
    return _cyclegan(cyclegan_b(), epochs=40)


def cyclegan_frontal() -> RunConfig:
    """CycleGAN-F, from the frontal view alone: the same for 50 epochs."""
    return _cyclegan(cyclegan_f(), epochs=50)


def cgan_128_biplanar() -> RunConfig:
    """cGAN-128: batch 4, rate 1e-4, 40 epochs of 2,873 pairs where one was published."""
    run = _constant(on_gpu(cgan_128()), OptimizerConfig(1e-4, beta_2=0.999))
    return replace(run, train=replace(run.train, steps=40 * CGAN_EPOCH))


def u_x2ctgan_slim() -> RunConfig:
    """u-X2CTGAN with 0.9 million parameters at 64^3, for two CPU cores."""
    run = on_two_cores(slim(u_x2ctgan()))
    return replace(run, optimizer=replace(run.optimizer, weight_decay=2e-4))


def cyclegan_b_slim() -> RunConfig:
    """CycleGAN-B with 0.8 million parameters at 64^3, for two CPU cores."""
    return _clipped(on_two_cores(slim(cyclegan_b())))


def cyclegan_f_slim() -> RunConfig:
    """CycleGAN-F with 0.8 million parameters at 64^3, for two CPU cores."""
    return _clipped(on_two_cores(slim(cyclegan_f())))


def cgan_128_slim() -> RunConfig:
    """cGAN-128 with 0.5 million parameters at 64^3, for two CPU cores."""
    return on_two_cores(slim(cgan_128()))


def _cyclegan(system: System, epochs: int) -> RunConfig:
    run = _clipped(_constant(on_gpu(system), OptimizerConfig(1e-5, beta_2=0.999)))
    return replace(
        run,
        data=replace(run.data, size=64),
        train=replace(run.train, batch=16, steps=epochs * CYCLEGAN_EPOCH),
    )


def _constant(run: RunConfig, optimizer: OptimizerConfig) -> RunConfig:
    """The published rates never fall."""
    return replace(run, optimizer=replace(optimizer, constant_share=1.0))


def _clipped(run: RunConfig) -> RunConfig:
    return replace(run, engine=replace(run.engine, gradient_clip=1.0))
