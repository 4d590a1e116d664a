"""Runs of the CNN and GAN systems: as published for a GPU, and slim for two CPU cores."""

from __future__ import annotations

from dataclasses import replace

from raylift.datasets.intensity import Window
from raylift.models.systems.cnn3d import cnn3d
from raylift.models.systems.cvaa import cvaa_gan
from raylift.models.systems.duolift import duolift_cnn, duolift_gan
from raylift.models.systems.psr import psr
from raylift.models.systems.slim import slim, tiny
from raylift.models.systems.trct import trct_gan
from raylift.models.systems.x2ct import x2ct_cnn, x2ct_gan
from raylift.models.systems.x_recon import x_recon
from raylift.platform.config import OptimizerConfig, RunConfig
from raylift.platform.presets.budgets import on_gpu, on_two_cores

FRONTAL = ("frontal",)


def psr_frontal() -> RunConfig:
    """PSR from the frontal view, as X2CT re-implemented it: channels are depths; weight decay 1e-4."""
    run = on_gpu(psr())
    return replace(run, optimizer=replace(run.optimizer, weight_decay=1e-4))


def cnn3d_biplanar() -> RunConfig:
    """3DCNN: repeated radiographs through a residual 3-D U-Net, regressing HU."""
    return on_gpu(cnn3d())


def x2ct_gan_biplanar() -> RunConfig:
    """X2CT-GAN as published, biplanar: 128^3, batch 4, 100 epochs of 916 volumes, rate constant then to zero."""
    return on_gpu(x2ct_gan())


def x2ct_gan_single() -> RunConfig:
    """X2CT-GAN as published, from the frontal view alone."""
    return on_gpu(x2ct_gan(FRONTAL))


def x2ct_cnn_biplanar() -> RunConfig:
    """X2CT-CNN: the biplanar generator without the adversarial term."""
    return on_gpu(x2ct_cnn())


def cvaa_gan_biplanar() -> RunConfig:
    """CVAA-GAN as published: 200 epochs of 212 volumes at 2 mm in batches of 4, HU from -1000 to 4096."""
    run = on_gpu(cvaa_gan())
    data = replace(run.data, window=Window(-1000.0, 4096.0))
    return replace(run, data=data, train=replace(run.train, steps=200 * 53))


def duolift_gan_biplanar() -> RunConfig:
    """DuoLift-GAN: features and images lifted side by side, U-Net++, a loss inside the lungs; with checkpointing."""
    return on_gpu(replace(duolift_gan(), checkpointing="all"))


def duolift_gan_single() -> RunConfig:
    """DuoLift-GAN from the frontal view alone."""
    return on_gpu(replace(duolift_gan(FRONTAL), checkpointing="all"))


def duolift_cnn_biplanar() -> RunConfig:
    """DuoLift-CNN: the same without the adversarial term."""
    return on_gpu(replace(duolift_cnn(), checkpointing="all"))


def x_recon_biplanar() -> RunConfig:
    """X-Recon as published: 224^3 at 1.6 mm, batch 1, rate 5e-5, 200 epochs; here in bf16 with checkpointing."""
    run = on_gpu(x_recon())
    return replace(
        run,
        data=replace(run.data, size=224),
        optimizer=replace(run.optimizer, rate=5e-5),
        engine=replace(run.engine, precision="bf16"),
        train=replace(run.train, batch=1, steps=200 * 916),
    )


def trct_gan_biplanar() -> RunConfig:
    """TRCT-GAN: transformers in the encoder and from voxels to pixels; what the abstract leaves open is ours."""
    return on_gpu(trct_gan())


def psr_slim() -> RunConfig:
    """PSR with 0.3 million parameters at 64^3, for two CPU cores."""
    run = on_two_cores(slim(psr()))
    return replace(run, optimizer=replace(run.optimizer, weight_decay=1e-4))


def cnn3d_slim() -> RunConfig:
    """3DCNN with 0.5 million parameters at 64^3, for two CPU cores."""
    return on_two_cores(slim(cnn3d()))


def x2ct_gan_slim() -> RunConfig:
    """X2CT-GAN with 1.2 million parameters at 64^3: trains on two CPU cores in minutes, for demos and trials."""
    return on_two_cores(slim(x2ct_gan()))


def x2ct_gan_single_slim() -> RunConfig:
    """X2CT-GAN from the frontal view with 0.5 million parameters at 64^3, for two CPU cores."""
    return on_two_cores(slim(x2ct_gan(FRONTAL)))


def x2ct_cnn_slim() -> RunConfig:
    """X2CT-CNN with 1.2 million parameters at 64^3, for two CPU cores."""
    return on_two_cores(slim(x2ct_cnn()))


def cvaa_gan_slim() -> RunConfig:
    """CVAA-GAN with 1.2 million parameters at 64^3, for two CPU cores.

    In the usual window: the published one is twice as wide and lungs and tissue lie close together in it, so that 300
    steps did not reach what 60 do here.
    """
    return on_two_cores(slim(cvaa_gan()))


def duolift_gan_slim() -> RunConfig:
    """DuoLift-GAN with 2.1 million parameters at 64^3, for two CPU cores."""
    return on_two_cores(slim(duolift_gan()))


def duolift_cnn_slim() -> RunConfig:
    """DuoLift-CNN with 2.1 million parameters at 64^3, for two CPU cores."""
    return on_two_cores(slim(duolift_cnn()))


def x_recon_slim() -> RunConfig:
    """X-Recon with 1.2 million parameters at 64^3, for two CPU cores."""
    return on_two_cores(slim(x_recon()))


def trct_gan_slim() -> RunConfig:
    """TRCT-GAN with 1.1 million parameters at 64^3, for two CPU cores."""
    return on_two_cores(slim(trct_gan()))


def x2ct_gan_tiny() -> RunConfig:
    """X2CT-GAN at 32^3 with four halvings: seconds a run, for tests and for trying a cluster."""
    run = on_two_cores(slim(x2ct_gan()))
    return replace(
        run,
        system=tiny(x2ct_gan()),
        data=replace(run.data, size=32),
        optimizer=OptimizerConfig(),
        train=replace(run.train, steps=20, batch=4, validate_every=10, log_every=5, validation_samples=2),
    )
