"""A served model: what a request may set, and what a client reads about it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from raylift.datasets.errors import ConfigError
from raylift.models.diffusion.diffusion_network import SamplingConfig
from raylift.models.weights import Description
from raylift.platform import model_store
from raylift.serve.settings import ServeSettings
from raylift.serve.view_text import in_words

MAX_SEED = 2**32 - 1
FIT_STEP_WEIGHT = 0.1
"""Assumed time of a step of the data-consistency fit, in evaluations of the network: more than that with a large
network, less than that with a small one."""


@dataclass(frozen=True)
class ReconstructionSettings:
    """What one request sets; None keeps the setting of the service."""

    samples: int = 1
    """Number of samples of a diffusion model, whose mean is the volume."""
    seed: int | None = None
    """Seed of the first sample."""
    steps: int | None = None
    """Evaluations of the denoiser."""
    consistency_steps: int | None = None
    """Steps of the data-consistency fit; 0 for none."""


@dataclass(frozen=True)
class ServedModel:
    """A model of a service, the settings of its reconstructions and their limits."""

    description: Description
    sha256: str
    """Digest of the weights."""
    consistency_steps: int = 0
    """Steps of the data-consistency fit; 0 for none."""
    sampling: SamplingConfig | None = None
    """Sampler settings of a diffusion model; None for a deterministic one."""
    max_samples: int = 1
    """Largest number of samples of a request."""
    max_steps: int = 1
    """Largest number of evaluations of the denoiser that a request may set."""
    max_consistency_steps: int = 0
    """Most steps of the data-consistency fit that a request may set."""
    name: str = "model"
    """Name in the field `model` of a request."""
    path: str = ""
    """Path of its routes, such as /2."""
    title: str = ""
    license: str | None = None
    """License of the weights and of the training data, if known."""
    card: str | None = None
    """The model card in Markdown; None for a model that is not in the registry."""

    @classmethod
    def load(cls, settings: ServeSettings, path: str, names: Collection[str]) -> ServedModel:
        """A model with its service's settings.

        Args:
            settings: of the service of this model.
            path: path of its routes.
            names: of other models of the service.
        """
        loaded = model_store.load(settings.model)
        sampling = settings.sampling.resolve(loaded.network)
        registered = model_store.registered(settings.model)
        # An exported folder has its own name, and not its path on this machine.
        name = settings.model if registered else PurePosixPath(settings.model).name
        system, views = loaded.description.system.name, [view.name for view in loaded.description.geometry.views]
        return cls(
            loaded.description,
            loaded.sha256,
            settings.consistency_steps,
            sampling,
            max_samples=settings.max_samples if sampling else 1,
            max_steps=max(settings.max_steps, sampling.steps) if sampling else 1,
            max_consistency_steps=max(settings.max_consistency_steps, settings.consistency_steps),
            name=name if name not in names else f"{name}-{len(names) + 1}",
            path=path,
            title=registered.title if registered else f"{system} from {in_words(views)} radiographs",
            license=registered.license if registered else None,
            card=model_store.card_of(settings.model),
        )

    @property
    def label(self) -> str:
        """Name and system on pages."""
        is_registered = self.name.startswith(model_store.PREFIX)
        return self.name if is_registered else f"{self.name} ({self.description.system.name})"

    @property
    def views(self) -> list[str]:
        """Names of the required views, in the model's order."""
        return [view.name for view in self.description.geometry.views]

    @property
    def multiple_samples(self) -> bool:
        """Whether a request may set a number of samples above 1."""
        return self.sampling is not None and self.max_samples > 1

    def weight(self, settings: ReconstructionSettings) -> float:
        """Computing time of a request as a multiple of that of a request that sets nothing.

        It is samples times evaluations of the network, each step of the fit counted as `FIT_STEP_WEIGHT` of one.
        """
        own = self.sampling.steps if self.sampling else 1
        steps = own if settings.steps is None else settings.steps
        fit = self.consistency_steps if settings.consistency_steps is None else settings.consistency_steps
        plain = own + FIT_STEP_WEIGHT * self.consistency_steps
        return settings.samples * (steps + FIT_STEP_WEIGHT * fit) / plain

    def parameters(self, settings: ReconstructionSettings) -> dict[str, Any]:
        """All values on which a request's volume depends besides its files, by the names of the fields."""
        sampling, steps = resolve_sampling(self.sampling, settings), settings.consistency_steps
        return {
            "model": self.name,
            **({"samples": settings.samples} | asdict(sampling) if sampling else {}),
            "consistency_steps": self.consistency_steps if steps is None else steps,
        }


def resolve_sampling(sampling: SamplingConfig | None, settings: ReconstructionSettings) -> SamplingConfig | None:
    """The sampler settings of a request, from those of the service; None for a deterministic model.

    Raises:
        ConfigError: a setting of a sampler for a deterministic model, or an invalid value.
    """
    if settings.samples < 1:
        raise ConfigError(f"{settings.samples} samples: give 1 or more")
    given = {name: value for name in ("steps", "seed") if (value := getattr(settings, name)) is not None}
    if sampling is not None:
        return replace(sampling, **given)
    ignored = [*given, *(["samples"] if settings.samples > 1 else [])]
    if ignored:
        raise ConfigError(f"this model is deterministic: leave out {', '.join(ignored)}")
    return None
