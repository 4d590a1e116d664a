"""The form of a reconstruction request: a pydantic model that FastAPI validates and documents.

A model's DRRs are the digitally reconstructed radiographs that it was trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import HTTPException, Request, UploadFile
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from raylift.datasets.geometry import MAX_VIEWS, View
from raylift.datasets.radiographs.decoding import Inversion
from raylift.datasets.radiographs.orientation import OrientedRadiograph, PatientFacingOption, expected_patient_facing
from raylift.serve.image_decoder import ImageDecoder
from raylift.serve.served_model import MAX_SEED, ReconstructionSettings, ServedModel
from raylift.serve.view_text import guidance

MAX_FILES = MAX_VIEWS
MAX_FIELDS = 16
"""A form with more files or other fields is refused while it is parsed."""
PARAMETERS = {field.name for field in dataclasses.fields(ReconstructionSettings)}


class ReconstructionForm(BaseModel):
    """The fields that every model accepts; `form_model` adds those of a model's views."""

    model_config = ConfigDict(extra="forbid")

    invert: Inversion = Field("auto", description="invert images in which bone is dark")

    @model_validator(mode="after")
    def _std_needs_two_samples(self) -> ReconstructionForm:
        if self.include_std and self.settings.samples == 1:
            raise ValueError("return_std requires samples to be 2 or more")
        return self

    @property
    def settings(self) -> ReconstructionSettings:
        """What the request sets."""
        return ReconstructionSettings(**{name: getattr(self, name) for name in PARAMETERS & self.model_fields_set})

    @property
    def include_std(self) -> bool:
        """Whether the standard deviation over samples is returned too."""
        return bool(getattr(self, "return_std", "false") == "true")

    async def radiographs(self, views: Sequence[View], decoder: ImageDecoder) -> dict[str, OrientedRadiograph]:
        """The network's input by view, in the orientation of the model's DRRs.

        Raises:
            HTTPException: 413 for a file over the size limit, 422 for an empty file.
            FileError: a file is not a readable radiograph.
        """
        images, max_bytes = {}, decoder.file_limits.max_bytes
        for k, view in enumerate(views):
            upload: UploadFile = getattr(self, f"view_{k}")
            if (upload.size or 0) > max_bytes:
                raise HTTPException(413, f"{view.name}: {upload.size} bytes, over the limit of {max_bytes}")
            data = await upload.read()
            if not data:
                raise HTTPException(422, f"field {view.name} is an empty file")
            flip = getattr(self, f"flip_{k}")
            patient_facing: PatientFacingOption | None = "auto" if flip == "auto" else None
            images[view.name] = await decoder.load(data, view, self.invert, flip == "true", patient_facing)
        return images


def form_model(model: ServedModel, names: Sequence[str]) -> type[ReconstructionForm]:
    """The form for a model: a file and a flip for each view, as fields NAME and flip_NAME, and its parameters.

    The attributes are `view_0`, `flip_0` and so on, because a name of a view need not be one of an attribute.
    `names` are those of all models of the service.
    """
    named = Field(model.name, description="name of the model", json_schema_extra={"enum": list(names)})
    fields: dict[str, Any] = {"model": (str, named)}
    for k, view in enumerate(model.description.geometry.views):
        name = view.name
        flip, alias = f"flip the {name} image left to right", f"flip_{name}"
        fields[f"view_{k}"] = UploadFile, Field(alias=name, description=f"{name} radiograph, {guidance(view)}")
        if expected_patient_facing(view) is None:
            fields[f"flip_{k}"] = Literal["true", "false"], Field("false", alias=alias, description=flip)
        else:
            flip += "; auto if the patient clearly faces the other edge than in the model's DRRs"
            fields[f"flip_{k}"] = Literal["auto", "true", "false"], Field("auto", alias=alias, description=flip)
    if model.multiple_samples:
        samples = f"number of samples, 1 to {model.max_samples}; their mean is returned"
        std = "return a zip of the mean and the standard deviation over samples"
        fields["samples"] = int, Field(1, ge=1, le=model.max_samples, description=samples)
        fields["return_std"] = Literal["true", "false"], Field("false", description=std)
    if model.sampling:
        seed = f"seed of the first sample, 0 to {MAX_SEED}; each further one adds 1"
        steps = f"evaluations of the denoiser, 1 to {model.max_steps}"
        fields["seed"] = int, Field(model.sampling.seed, ge=0, le=MAX_SEED, description=seed)
        fields["steps"] = int, Field(model.sampling.steps, ge=1, le=model.max_steps, description=steps)
    if limit := model.max_consistency_steps:
        fit = f"steps of the data-consistency fit, 0 (none) to {limit}"
        fields["consistency_steps"] = int, Field(model.consistency_steps, ge=0, le=limit, description=fit)
    return create_model("ReconstructionForm", __base__=ReconstructionForm, **fields)


def field_names(form: type[ReconstructionForm]) -> list[str]:
    """The names of a form's fields in requests."""
    return [field.alias or name for name, field in form.model_fields.items()]


async def require_multipart(request: Request) -> None:
    """Refuse what FastAPI accepts: another body as an empty form, the last value of a repeated field, and no value.

    Raises:
        HTTPException: 415 for another content type, 422 for a repeated field and for one without a value.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise HTTPException(415, "send the radiographs as multipart/form-data")
    form = await request.form()
    repeated = sorted(f"{name:.40}" for name in form if len(form.getlist(name)) > 1)
    if repeated:
        raise HTTPException(422, f"field {', '.join(repeated)} was sent more than once")
    if empty := sorted(f"{name:.40}" for name, value in form.items() if value == ""):
        raise HTTPException(422, f"field {', '.join(empty)} is empty: leave it out")
