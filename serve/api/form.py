"""The form of a reconstruction request: a pydantic model that FastAPI validates and documents.

A model's DRRs are the digitally reconstructed radiographs that it was trained on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from fastapi import HTTPException, Request, UploadFile
from jaxtyping import Float32
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from raylift.datasets.geometry import View
from raylift.datasets.radiographs.decoding import Inversion, RadiographLimits
from raylift.datasets.radiographs.orientation import PatientFacingOption, expected_patient_facing
from raylift.datasets.radiographs.preparation import load_radiograph

ORIENTATION = {"frontal": ", the patient's right at the left edge", "lateral": ", the patient facing the left edge"}
MAX_FILES = 8
MAX_FIELDS = 16
"""A form with more files or other fields is refused while it is parsed."""


class ReconstructionForm(BaseModel):
    """The fields that every model accepts; `form_model` adds those of a model's views."""

    model_config = ConfigDict(extra="forbid")

    invert: Inversion = Field("auto", description="invert images in which bone is dark")

    @model_validator(mode="after")
    def _std_needs_two_samples(self) -> ReconstructionForm:
        if self.include_std and self.sample_count == 1:
            raise ValueError("return_std requires samples to be 2 or more")
        return self

    @property
    def sample_count(self) -> int:
        """Number of samples whose mean is returned."""
        return int(getattr(self, "samples", 1))

    @property
    def include_std(self) -> bool:
        """Whether the standard deviation over samples is returned too."""
        return bool(getattr(self, "return_std", "false") == "true")

    async def radiographs(
        self, poses: Sequence[View], limits: RadiographLimits
    ) -> dict[str, Float32[np.ndarray, "_ _"]]:
        """The decoded images by view, bone bright, in the orientation of the model's DRRs.

        Raises:
            HTTPException: 413 for a file over the size limit, 422 for an empty file.
            RefusedFile: a file is not a readable radiograph.
        """
        images = {}
        for pose in poses:
            upload: UploadFile = getattr(self, pose.name)
            if (upload.size or 0) > limits.max_bytes:
                raise HTTPException(413, f"{pose.name}: {upload.size} bytes, over the limit of {limits.max_bytes}")
            data = await upload.read()
            if not data:
                raise HTTPException(422, f"field {pose.name} is an empty file")
            images[pose.name] = await asyncio.to_thread(self._decode, data, pose, limits)
        return images

    def _decode(self, data: bytes, pose: View, limits: RadiographLimits) -> Float32[np.ndarray, "_ _"]:
        flip = getattr(self, f"flip_{pose.name}")
        patient_facing: PatientFacingOption | None = "auto" if flip == "auto" else None
        loaded = load_radiograph(
            data, pose, limits=limits, invert=self.invert, flip=flip == "true", patient_facing=patient_facing
        )
        return loaded.image


def form_model(poses: Sequence[View], max_samples: int) -> type[ReconstructionForm]:
    """The form for a model's views: a file and a flip for each.

    With `max_samples` above 1 the form also has the fields `samples` and `return_std`.
    """
    fields: dict[str, Any] = {}
    for pose in poses:
        view = pose.name
        flip = f"mirror the {view} image left to right"
        fields[view] = UploadFile, Field(description=f"{view} radiograph{ORIENTATION.get(view, '')}")
        if expected_patient_facing(pose) is None:
            fields[f"flip_{view}"] = Literal["true", "false"], Field("false", description=flip)
        else:
            flip += "; auto if the patient clearly faces the other edge than in the model's DRRs"
            fields[f"flip_{view}"] = Literal["auto", "true", "false"], Field("auto", description=flip)
    if max_samples > 1:
        samples = f"number of samples, 1 to {max_samples}; their mean is returned"
        std = "return a zip of the mean and the standard deviation over samples"
        fields["samples"] = int, Field(1, ge=1, le=max_samples, description=samples)
        fields["return_std"] = Literal["true", "false"], Field("false", description=std)
    return create_model("ReconstructionForm", __base__=ReconstructionForm, **fields)


async def require_multipart(request: Request) -> None:
    """Refuse what FastAPI accepts: a body of another type as an empty form, and the last value of a repeated field.

    Raises:
        HTTPException: 415 for another content type, 422 for a repeated field.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise HTTPException(415, "send the radiographs as multipart/form-data")
    form = await request.form()
    repeated = sorted(f"{name:.40}" for name in form if len(form.getlist(name)) > 1)
    if repeated:
        raise HTTPException(422, f"field {', '.join(repeated)} was sent more than once")
