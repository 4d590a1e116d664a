"""The entry of a system in its file of `models/systems/`: paper, full settings, variants and training.

`models.zoo.SYSTEMS` holds a `SystemEntry` for each system. Presets, `raylift systems`, the table of systems in the
documentation and the default preset of a search space are made from them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from raylift.datasets.intensity import Normalization, Window
from raylift.models.system_config import DEFAULT_WINDOW, SystemConfig

Kind = Literal["regression", "GAN", "diffusion", "reprojection", "unpaired"]
Views = Literal["1", "2", "1 or 2", "any"]


@dataclass(frozen=True)
class Training:
    """How a system is trained; the defaults are X2CT-GAN's on one GPU."""

    size: int = 128
    """Voxels per side."""
    window: Window = DEFAULT_WINDOW
    """The HU range that maps to the network's [0, 1]."""
    normalization: Normalization = "percentiles"
    """How radiographs are scaled to the network's [0, 1]."""
    steps: int = 22_900
    """Optimizer steps of each network: 100 epochs of 916 volumes in batches of 4."""
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    lr: float = 2e-4
    """Adam's learning rate, constant at first, then with a linear decay to zero."""
    betas: tuple[float, float] = (0.5, 0.99)
    decay_start: float = 0.5
    """Fraction of all steps after which the learning rate decays; 1: it stays constant."""
    weight_decay: float = 0.0
    gradient_clipping: float = 0.0
    """Maximum L2 norm of a network's gradient; 0: no clipping."""
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["GPU", "CPU"] = "GPU"
    """One GPU, or two workers of one CPU core each."""
    validate_every: int = 500
    """Steps between validations."""
    log_every: int = 10
    validation_samples: int = 16


GPU_TRAINING = Training()

SLIM_TRAINING = Training(
    size=64,
    steps=300,
    batch_size=2,
    # Of 2e-4, 5e-4 and 1e-3 the fastest in the first 100 steps; at 2e-3 training does not converge.
    lr=1e-3,
    device="CPU",
    validate_every=50,
    validation_samples=4,
)
"""Minutes on two CPU cores."""

TINY_TRAINING = replace(
    SLIM_TRAINING, size=32, steps=20, batch_size=4, validate_every=10, log_every=5, validation_samples=2
)
"""Seconds on two CPU cores, for tests and for trying a cluster."""


@dataclass(frozen=True)
class ParameterCount:
    """A published number of parameters, which a test compares with the network."""

    count: int
    network: str = "generator"
    """A name of `Objective.networks`."""
    views: tuple[str, ...] = ("frontal", "lateral")
    size: int = 128
    """Voxels per side."""


@dataclass(frozen=True)
class SystemEntry:
    """A system of the literature or of raylift's own. Its name is that of its settings and its key in `zoo.SYSTEMS`."""

    title: str
    """As the paper writes it."""
    summary: str
    """A phrase that describes the network."""
    paper: str
    """Authors, venue and identifier."""
    year: int | None
    """Year of the paper; None where there is none."""
    views: Views
    """How many radiographs the paper reconstructs from."""
    kind: Kind
    full: SystemConfig
    """The settings as published, or at the full size of a system of raylift's own."""
    slim: SystemConfig
    """The same parts at 64 voxels per side with about two million parameters or fewer, for CPU cores."""
    tiny: SystemConfig
    """The same parts at 32 voxels per side, for tests."""
    training: Training = GPU_TRAINING
    slim_training: Training = SLIM_TRAINING
    tiny_training: Training = TINY_TRAINING
    spacing_mm: float = 2.5
    """Voxel spacing of the full size."""
    parameters: tuple[ParameterCount, ...] = ()
    """Published counts."""
    single_view: SystemConfig | None = None
    """The published settings for the frontal view alone, where the paper has both; trained as the biplanar ones."""
    single_view_slim: SystemConfig | None = None

    @property
    def name(self) -> str:
        """The name of the settings."""
        return self.full.name

    def variants(self) -> dict[str, tuple[SystemConfig, Training]]:
        """Settings and training by the name of their preset."""
        presets = {
            self.name: (self.full, self.training),
            f"{self.name}-single": (self.single_view, self.training),
            f"{self.name}-slim": (self.slim, self.slim_training),
            f"{self.name}-single-slim": (self.single_view_slim, self.slim_training),
            f"{self.name}-tiny": (self.tiny, self.tiny_training),
        }
        return {name: (system, training) for name, (system, training) in presets.items() if system is not None}
