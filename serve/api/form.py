"""The form of a request, checked field by field: what passes is named, bounded and an image."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeVar, get_args

import numpy as np
from jaxtyping import Float32
from starlette.datastructures import FormData, UploadFile

from raylift.datasets.errors import RayliftError, RefusedFile
from raylift.datasets.geometry import View
from raylift.datasets.radiographs.decoding import Inversion, RadiographLimits, read
from raylift.datasets.radiographs.orientation import as_projected, projected

VIEWS = ("frontal", "lateral")
Choice = TypeVar("Choice", bound=str)


class BadRequest(RayliftError, ValueError):
    """A request that cannot be served, with the HTTP status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def radiographs(
    form: FormData, poses: Sequence[View], limits: RadiographLimits, max_samples: int = 1
) -> dict[str, Float32[np.ndarray, "_ _"]]:
    """The images of a form by view, bone bright, for a model that was trained on these poses.

    Fields: `frontal` and `lateral` are files; `invert` is auto, yes or no for both; `flip_frontal` and `flip_lateral`
    are true or false, and of a lateral view auto, which mirrors it where the patient clearly faces otherwise than in
    projections. Where more than one sample may be asked for, `samples` and `spread` may be there too.

    Raises:
        BadRequest: 422 for a wrong, missing, surplus or repeated field; 415 for what is no image that can be used; 413
            for one that is too large.
    """
    wanted = [pose.name for pose in poses]
    known = [*wanted, "invert", *(f"flip_{view}" for view in wanted)]
    known += ["samples", "spread"] if max_samples > 1 else []
    _check_fields(form, known, wanted)
    invert = _choice(form, "invert", get_args(Inversion), "auto")
    images = {}
    for pose in poses:
        view = pose.name
        upload = form[view]
        if not isinstance(upload, UploadFile):
            raise BadRequest(422, f"field {view} is text: send a file")
        flips = flip_choices(pose)
        flip = _choice(form, f"flip_{view}", flips, flips[0])
        if (upload.size or 0) > limits.max_bytes:
            raise BadRequest(413, f"{view}: {upload.size} bytes, over the limit of {limits.max_bytes}")
        data = await upload.read()
        if not data:
            raise BadRequest(422, f"field {view} is an empty file")
        try:
            image = await asyncio.to_thread(read, data, view, limits, view=view, invert=invert, flip=flip == "true")
        except RefusedFile as error:
            raise BadRequest(415, str(error)) from error
        images[view] = await asyncio.to_thread(as_projected, image, pose) if flip == "auto" else image
    return images


def flip_choices(pose: View) -> tuple[str, ...]:
    """What the field that mirrors a view may say, what it says by itself first."""
    return ("false", "true") if projected(pose) is None else ("auto", "true", "false")


def asked_draws(form: FormData, max_samples: int) -> tuple[int, bool]:
    """How many draws the field `samples` asks for, and whether `spread` asks for their standard deviation too.

    Raises:
        BadRequest: 422 for a number outside 1 to `max_samples`, or the spread of a single draw.
    """
    counts = [str(count) for count in range(1, max_samples + 1)]
    samples = int(_choice(form, "samples", counts, "1"))
    spread = _choice(form, "spread", ("true", "false"), "false") == "true"
    if spread and samples == 1:
        raise BadRequest(422, "field spread is true, and a single draw has none: send samples from 2 up with it")
    return samples, spread


def _check_fields(form: FormData, known: list[str], wanted: list[str]) -> None:
    given = [view for view in VIEWS if view in form]
    if set(given) != set(wanted):
        raise BadRequest(
            422, f"this model wants {' and '.join(wanted)}; sent were {' and '.join(given) or 'no images'}"
        )
    unknown = sorted(f"{name:.40}" for name in set(form) - set(known))
    if unknown:
        raise BadRequest(422, f"unknown field {', '.join(unknown)}: send {', '.join(known)}")
    repeated = sorted(name for name in form if len(form.getlist(name)) > 1)
    if repeated:
        raise BadRequest(422, f"field {', '.join(repeated)} was sent more than once")


def _choice(form: FormData, name: str, choices: Sequence[Choice], default: Choice) -> Choice:
    value = form.get(name, default)
    for choice in choices:
        if value == choice:
            return choice
    shown = f"'{value:.40}'" if isinstance(value, str) else "a file"
    raise BadRequest(422, f"field {name} is {shown}: send {', '.join(choices[:-1])} or {choices[-1]}")
