"""What a run may spend: one GPU and a published schedule, or minutes on two CPU cores."""

from __future__ import annotations

from raylift.models.zoo import System
from raylift.platform.config import (
    ClusterConfig,
    DataConfig,
    EngineConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)


def on_gpu(system: System) -> RunConfig:
    """X2CT-GAN's data and schedule on one GPU: 128^3, batch 4, 100 epochs of 916 volumes, constant, then to zero."""
    return RunConfig(system, cluster=ClusterConfig(workers=1, gpus_per_worker=1.0), engine=EngineConfig(zero_stage=0))


def on_two_cores(system: System) -> RunConfig:
    """A slim system at 64^3, for minutes on two CPU cores."""
    return RunConfig(
        system,
        data=DataConfig(size=64),
        # Of 2e-4, 5e-4 and 1e-3 the fastest in the first 100 steps; at 2e-3 it does not learn.
        optimizer=OptimizerConfig(rate=1e-3),
        train=TrainConfig(steps=300, batch=2, validate_every=50, log_every=10, validation_samples=4),
    )
