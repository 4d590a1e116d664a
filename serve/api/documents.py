"""JSON documents of the API: models, what a reconstruction states without its voxels, and jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from raylift import __version__
from raylift.datasets.radiographs.check_result import CheckResult, worst
from raylift.datasets.serialization import to_plain
from raylift.models.diffusion.samplers import SamplerName
from raylift.serve.api.problem import Problem
from raylift.serve.backend import DISCLAIMER
from raylift.serve.reconstructor import HUVolume
from raylift.serve.served_model import MAX_SEED, ReconstructionSettings, ServedModel


class Parameter(BaseModel):
    """Default and limits of a request's parameter."""

    default: int
    min: int
    max: int


class ModelInfo(BaseModel):
    """A served model."""

    name: str = Field(description="value of the field `model` of a request", examples=["models:chest-64"])
    title: str
    path: str = Field(description="the model's routes are below this path; empty for the first model")
    system: str
    views: list[str] = Field(description="required radiographs")
    geometry: dict[str, Any] = Field(description="poses of the views, beam, distances in mm and detector")
    size: int = Field(description="voxels along each axis of the volume")
    shape: tuple[int, int, int] = Field(description="slices, rows and columns of the volume")
    spacing_mm: float
    window_hu: tuple[float, float] = Field(description="lowest and highest HU of the output")
    sha256: str = Field(description="digest of the weights")
    sampler: SamplerName | None = Field(description="null for a deterministic model")
    parameters: dict[str, Parameter] = Field(
        description="parameters that a request may set; any other one is refused",
        examples=[{"consistency_steps": {"default": 0, "min": 0, "max": 20}}],
    )
    license: str | None = Field(description="of the weights and of the training data; null if it is not known")
    card: str | None = Field(description="the card of a model of raylift, in Markdown; null for any other one")
    raylift: str = Field(description="version of raylift")
    notice: str

    @classmethod
    def of(cls, model: ServedModel) -> ModelInfo:
        """The document of a model."""
        description, sampling = model.description, model.sampling
        grid, window = description.grid, description.window
        parameters = {}
        if model.multiple_samples:
            parameters["samples"] = Parameter(default=1, min=1, max=model.max_samples)
        if sampling:
            parameters["seed"] = Parameter(default=sampling.seed, min=0, max=MAX_SEED)
            parameters["steps"] = Parameter(default=sampling.steps, min=1, max=model.max_steps)
        if limit := model.max_consistency_steps:
            parameters["consistency_steps"] = Parameter(default=model.consistency_steps, min=0, max=limit)
        return cls(
            name=model.name,
            title=model.title,
            path=model.path,
            system=description.system.name,
            views=model.views,
            geometry=to_plain(description.geometry),
            size=grid.size,
            shape=(grid.size,) * 3,
            spacing_mm=grid.spacing_mm,
            window_hu=(window.low_hu, window.high_hu),
            sha256=model.sha256,
            sampler=sampling.sampler if sampling else None,
            parameters=parameters,
            license=model.license,
            card=model.card,
            raylift=__version__,
            notice=DISCLAIMER,
        )


class ModelList(BaseModel):
    """All models of a service."""

    models: list[ModelInfo]


class HURange(BaseModel):
    """Values of a volume in HU."""

    min: int
    mean: float
    max: int


class Residual(BaseModel):
    """Relative L2 distance between reprojection and radiograph, before and after the data-consistency fit."""

    before: float
    after: float


EXAMPLE: dict[str, Any] = {
    "model": "0f" * 32,
    "parameters": {"model": "models:chest-64", "consistency_steps": 10},
    "size": 64,
    "spacing_mm": 5.0,
    "hu": {"min": -1024, "mean": -512.0, "max": 1000},
    "level": "ok",
    "checks": {"frontal": [], "lateral": []},
    "notes": {"frontal": ["inverted (bone was dark)"]},
    "residuals": {"frontal": {"before": 0.1, "after": 0.05}},
    "notice": DISCLAIMER,
}
"""Values of no real volume."""


class ReconstructionReport(BaseModel):
    """What a reconstruction states without its voxels."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    model: str = Field(description="SHA-256 of the weights")
    parameters: dict[str, str | int] = Field(description="all values on which the volume depends besides the files")
    size: int = Field(description="voxels along each axis of the volume")
    spacing_mm: float
    hu: HURange
    level: Literal["ok", "caution", "stop"] = Field(description="worst level of the checks of the input")
    checks: dict[str, list[dict[str, Any]]] = Field(description="results of these checks by view")
    notes: dict[str, list[str]] = Field(description="what was changed or ignored in reading the files, by view")
    residuals: dict[str, Residual] = Field(description="by view; empty without a data-consistency fit")
    notice: str

    @classmethod
    def of(
        cls,
        result: HUVolume,
        checks: Mapping[str, Sequence[CheckResult]],
        notes: Mapping[str, Sequence[str]],
        model: ServedModel,
        settings: ReconstructionSettings,
    ) -> ReconstructionReport:
        """The document of a reconstruction."""
        grid, hu = model.description.grid, result.hu
        return cls(
            model=model.sha256,
            parameters=model.parameters(settings),
            size=grid.size,
            spacing_mm=grid.spacing_mm,
            hu=HURange(min=int(hu.min()), mean=float(hu.mean()), max=int(hu.max())),
            level=worst(check for of_view in checks.values() for check in of_view),
            checks={view: to_plain(of_view) for view, of_view in checks.items()},
            notes={view: list(of_view) for view, of_view in notes.items()},
            residuals={view: Residual(before=pair[0], after=pair[1]) for view, pair in result.residuals.items()},
            notice=DISCLAIMER,
        )


JobState = Literal["queued", "running", "succeeded", "failed", "canceled"]
JOB_EXAMPLE: dict[str, Any] = {
    "id": "0f" * 16,
    "state": "running",
    "stage": "forward",
    "step": 12,
    "steps": 40,
    "seconds_left": 21.5,
    "created": "2026-01-01T12:00:00Z",
    "links": {"self": f"/v1/jobs/{'0f' * 16}", "events": f"/v1/jobs/{'0f' * 16}/events"},
}


class JobInfo(BaseModel):
    """A job."""

    model_config = ConfigDict(json_schema_extra={"examples": [JOB_EXAMPLE]})

    id: str
    state: JobState
    stage: Literal["forward", "fit", "encoding"] | None = Field(
        None, description="of a running job: the network, the data-consistency fit, or the encoding of the volume"
    )
    step: int | None = Field(None, description="evaluation of the network or step of the fit that is computed, from 1")
    steps: int | None = Field(None, description="their number")
    seconds_left: float | None = Field(
        None, description="by the duration of the steps so far; null before the second one"
    )
    created: datetime
    expires: datetime | None = Field(None, description="when an ended job and its result are removed")
    error: Problem | None = Field(None, description="why a job failed")
    links: dict[str, str] = Field(description="paths: self, events and, of a job that succeeded, result")
