"""The configuration of a run as one tree of frozen dataclasses, with units in the names."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import tyro
import yaml

from raylift.datasets.archive.store import absolute
from raylift.datasets.augmentation.augmentation import Augmentation
from raylift.datasets.errors import ConfigError
from raylift.datasets.intensity import Normalization, Window
from raylift.datasets.serialization import from_plain, require_minimum, to_plain
from raylift.models.composition import Composition
from raylift.models.system_config import SystemConfig
from raylift.models.zoo import check_name


@dataclass(frozen=True)
class DataConfig:
    """Data of a run, and how it is read."""

    archive: str = "archive"
    """Folder or URL of the archive."""
    snapshot: int | Literal["latest"] = "latest"
    """Snapshot of the archive. A run keeps the one that is the latest when it begins; `--resume RUN --data.snapshot
    latest` moves it to the newest."""
    unpaired: str = ""
    """Folder or URL of an archive of CT, whose train split a CycleGAN system uses as unpaired
    volumes; empty: none."""
    unpaired_snapshot: int | Literal["latest"] = "latest"
    """As `snapshot`, of the unpaired archive."""
    match_histograms: bool = False
    """Whether the histogram of every radiograph is matched to that of digitally reconstructed radiographs (DRRs) of the
    archive's CT, or else of the unpaired archive's, in training, evaluation and inference."""
    size: int = 128
    """Voxels per side; must be the archive's."""
    window: Window = field(default_factory=Window)
    """The HU range that is mapped to [0, 1] for the network."""
    normalization: Normalization = "percentiles"
    """How radiographs are scaled to [0, 1]: each by its own percentiles, or divided by its maximum in 8 bits as
    X2CT-GAN's are."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Random deformation of a CT, jitter of its geometry, and simulated acquisition of its radiographs."""
    phantoms_per_epoch: int = 0
    """New phantoms in every epoch in addition to the archive's CT scans, made by the reader threads. Their seeds differ
    from those of archives."""
    ct_repeats: int = 1
    """Times that each CT scan of the archive occurs in an epoch."""
    threads: int = 2
    """Reader threads per worker."""
    prefetch_batches: int = 2
    """Global batches that are read ahead of training."""
    cache_gib: float = 1.0
    """Memory of a worker's cache of samples, which later epochs need not read again."""

    def __post_init__(self) -> None:
        require_minimum(self, 1, "size", "threads", "ct_repeats")
        require_minimum(self, 0, "prefetch_batches", "cache_gib", "phantoms_per_epoch")
        if self.match_histograms and self.normalization == "maximum":
            raise ConfigError(
                "data.match-histograms matches radiographs normalized by percentiles: set data.normalization to "
                "percentiles, or data.match-histograms to false"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """`torch.optim.Adam` of every network: a constant learning rate, then linear decay to 0. Defaults: X2CT-GAN's."""

    lr: float = 2e-4
    """Learning rate before the decay."""
    betas: tuple[float, float] = (0.5, 0.99)
    """Decay rates of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    decay_start: float = 0.5
    """Fraction of all steps after which the learning rate decays; 1: it stays constant."""
    weight_decay: float = 0.0
    """Adam's L2 penalty: this times each weight is added to its gradient."""

    def __post_init__(self) -> None:
        if not (
            self.lr > 0
            and all(0 <= beta < 1 for beta in self.betas)
            and 0 <= self.decay_start <= 1
            and self.weight_decay >= 0
        ):
            raise ConfigError(
                f"{self}: lr must be positive, betas in [0, 1), decay_start in [0, 1], weight_decay not below 0"
            )

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of a step. It depends on the step alone, so a resumed run continues with it."""
        begin = self.decay_start * steps
        if step < begin:
            return self.lr
        return self.lr * max(0.0, (steps - step) / max(1.0, steps - begin))


@dataclass(frozen=True)
class EngineConfig:
    """Settings of DeepSpeed."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards across workers: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes convolutions and matrix products in bfloat16; weights and Adam stay in fp32."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    gradient_clipping: float = 0.0
    """Maximum L2 norm of a network's gradient; 0: no clipping."""

    def __post_init__(self) -> None:
        require_minimum(self, 1, "gradient_accumulation_steps")
        require_minimum(self, 0, "gradient_clipping")


@dataclass(frozen=True)
class ClusterConfig:
    """Resources that a run reserves in Ray."""

    workers: int = 2
    """Data-parallel workers."""
    cpus_per_worker: float = 1.0
    """CPU cores that Ray reserves for a worker."""
    gpus_per_worker: float = 0.0
    """GPUs that Ray reserves for a worker; 0 trains on the CPU."""
    threads_per_worker: int = 1
    """PyTorch threads; on small 3-D networks one can be faster than two."""
    max_failures: int = 2
    """Times a run starts again from its newest checkpoint after losing a worker."""
    stall_timeout_s: float = 120.0
    """Seconds without a response after which a worker counts as lost."""
    grace_s: float = 8.0
    """Seconds after SIGTERM within which a run writes a checkpoint before it ends; 0: it ends at once."""

    def __post_init__(self) -> None:
        require_minimum(self, 1, "workers", "threads_per_worker", "stall_timeout_s")
        require_minimum(self, 0, "cpus_per_worker", "gpus_per_worker", "max_failures", "grace_s")


@dataclass(frozen=True)
class TrainConfig:
    """Number of steps, batch size, intervals of logs and validations, and checkpoints kept."""

    steps: int = 22_900
    """Optimizer steps of each network."""
    batch_size: int = 4
    """Global batch size: samples per step over all workers and micro-batches. Independent of the number of workers."""
    seed: int = 0
    """Seed of initial weights, order of samples and random numbers in training."""
    log_every: int = 10
    """Steps between log lines."""
    validate_every: int = 500
    """Steps between validations, which is also when a checkpoint is written."""
    validation_samples: int = 16
    """Maximum number of samples of the val split in each validation."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, in addition to the best one."""
    divergence_factor: float = 1000.0
    """A loss or gradient norm of more than this times its running median is a divergence. It is printed, and the newest
    checkpoint before it is kept."""
    stop_on_divergence: bool = False
    """Whether the run ends at a divergence."""
    initial_model: Annotated[str, tyro.conf.arg(aliases=["--from"])] = ""
    """Model whose weights the reconstruction network (a GAN's generator) starts with, for fine-tuning: models:NAME,
    a run (its best checkpoint), a checkpoint or an exported model; empty: random initial weights."""

    def __post_init__(self) -> None:
        require_minimum(
            self, 1, "steps", "batch_size", "log_every", "validate_every", "validation_samples", "keep_checkpoints"
        )
        require_minimum(self, 0, "seed")
        require_minimum(self, 1, "divergence_factor")


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    system: SystemConfig = field(default_factory=Composition)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_name(self.system)
        if self.system.supervision == "radiographs" and self.data.normalization == "maximum":
            raise ConfigError(
                f"system {self.system.name} compares radiographs with DRRs normalized by percentiles: set "
                "data.normalization to percentiles"
            )
        share = self.cluster.workers * self.engine.gradient_accumulation_steps
        if self.train.batch_size % share:
            raise ConfigError(
                f"train.batch_size {self.train.batch_size} cannot be shared by {self.cluster.workers} workers in "
                f"{self.engine.gradient_accumulation_steps} micro-batches: use a multiple of {share}"
            )

    def to_yaml(self) -> str:
        """The whole tree; `--config` accepts it."""
        return yaml.safe_dump(to_plain(self), sort_keys=False)

    def sha256(self) -> str:
        """A digest of the whole tree."""
        return hashlib.sha256(json.dumps(to_plain(self), sort_keys=True).encode()).hexdigest()


def with_absolute_paths(run: RunConfig) -> RunConfig:
    """The run with absolute paths, because workers do not share the caller's working directory."""
    data = run.data
    unpaired = absolute(data.unpaired) if data.unpaired else ""
    return replace(run, data=replace(data, archive=absolute(data.archive), unpaired=unpaired))


def from_yaml(text: str, where: str) -> RunConfig:
    """The run of a YAML file; absent keys have their defaults, unknown ones are errors."""
    try:
        data = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from error
    return from_plain(RunConfig, data, where)


def override(run: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The run with some values replaced, each named by its dotted key.

    Raises:
        ConfigError: a key does not exist, or its value has the wrong type.
    """
    tree = to_plain(run)
    for key, value in values.items():
        *path, last = key.split(".")
        node = tree
        for name in path:
            node = node.get(name) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            raise ConfigError(f"'{key}' is not a setting: {_nearest(key, tree)}")
        node[last] = value
    return from_plain(RunConfig, tree, "run")


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a plain tree by dotted key."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flatten(value, f"{prefix}.{name}" if prefix else name)
    return leaves


def _nearest(key: str, tree: dict[str, Any]) -> str:
    close = difflib.get_close_matches(key, flatten(tree), n=3)
    return f"did you mean {' or '.join(close)}?" if close else "see raylift train PRESET --dry-run"
