"""What the page's buttons do, apart from how they look."""

from __future__ import annotations

import asyncio
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder
from jaxtyping import Float32, Int16

from raylift.datasets.errors import ConfigError, RayliftError
from raylift.datasets.radiographs.decoding import Inversion, RadiographLimits, read
from raylift.datasets.radiographs.orientation import hang
from raylift.serve.api.routes import Backend
from raylift.serve.page import example
from raylift.serve.page.images import Plane, beside, enlarge, marked, reprojections, slice_picture
from raylift.serve.page.std_map import SpreadMap
from raylift.serve.reconstructor import prepared_one, told

Volume = Int16[np.ndarray, "d h w"]


HANGING = {
    "frontal": "The patient's right belongs at the left edge.",
    "lateral": "The patient faces the left edge.",
}


class Given(NamedTuple):
    """What the page holds for one view."""

    path: str | None
    invert: Inversion
    flip: bool


class Actions:
    """The page's answers for one model; nothing of a visitor is kept here, so many can use the page at once."""

    def __init__(self, backend: Backend, limits: RadiographLimits) -> None:
        self._backend, self._limits = backend, limits

    def look(self, view: str, path: str | None, invert: Inversion, flip: bool) -> list[Any]:
        """The preview of a radiograph, as the network will see it, and the message where there is none."""
        if path is None:
            return [gr.Image(value=None, visible=False), gr.Markdown(visible=False)]
        try:
            prepared = self._prepare(view, Given(path, invert, flip))
        except RayliftError as error:
            return [gr.Image(value=None, visible=False), gr.Markdown(sentence(error), visible=True)]
        return [gr.Image(value=marked(enlarge(prepared), view), visible=True), gr.Markdown(visible=False)]

    def face(self, view: str, path: str | None, invert: Inversion) -> Any:
        """The flip control for a lateral radiograph that was just chosen, set where its facing is clear."""
        pose = self._backend.description.geometry.view(view)
        try:
            data = Path(path).read_bytes() if path else b""
            image = read(data, view, self._limits, view=view, invert=invert) if data else None
        except (RayliftError, FileNotFoundError):
            image = None  # the preview says what is wrong
        hung = None if image is None else hang(image, pose, "auto")
        if hung is None:
            return gr.Checkbox(value=False, info=HANGING[view] + ("" if image is None else " Here it is not clear."))
        faced = "faced" if hung.mirrored else "faces"
        return gr.Checkbox(value=hung.mirrored, info=f"{HANGING[view]} This one {faced} {hung.facing}.")

    async def reconstruct(self, *values: Any) -> list[Any]:
        """Everything that is shown of a volume, from path, inversion and flip of each view in turn.

        Of a model that draws, the number of draws stands behind them, and what is shown of their spread comes last.
        """
        began = time.monotonic()
        views = len(self._backend.views)
        given = [Given(*values[3 * k : 3 * k + 3]) for k in range(views)]
        samples = int(values[3 * views]) if len(values) > 3 * views else 1
        samples = max(1, min(samples, self._backend.max_samples))
        try:
            prepared = await asyncio.to_thread(self._prepare_all, given)
            made = await self._backend.reconstruct(prepared, samples)
        except RayliftError as error:
            raise gr.Error(sentence(error), duration=None) from error
        except Exception as error:
            # Gradio would show an empty message.
            raise gr.Error("The service failed: its log says why.", duration=None) from error
        seconds, volume = time.monotonic() - began, made.hu
        checks, download = await asyncio.gather(
            asyncio.to_thread(self._checks, prepared, volume),
            asyncio.to_thread(self._download, volume, "reconstruction.nii.gz"),
        )
        grid = self._backend.description.grid
        facts = (
            f"{grid.size}³ voxels of {grid.spacing_mm:g} mm, {volume.min()} to {volume.max()} HU, in {seconds:.1f} s. "
            "Letters are the patient's right, left, anterior, posterior, superior and inferior."
        )
        draw = self._backend.draw
        if draw and samples > 1:
            facts += f" Mean of {samples} draws, seeds {draw.seed} to {draw.seed + samples - 1}."
        if made.residuals:
            facts += f" Fitted to the radiographs; projection residual: {told(made.residuals)}."
        shown = [volume, gr.Column(visible=True), facts, *checks, download]
        return shown + (await asyncio.to_thread(self._spread, made.deviation) if self._backend.draws else [])

    def _spread(self, deviation: Volume | None) -> list[Any]:
        """The map's state, its switch set back to the volume, the bar and the file."""
        if deviation is None:
            return [None, gr.Radio(value="volume", visible=False), "", gr.DownloadButton(visible=False)]
        download = self._download(deviation, "reconstruction-std.nii.gz")
        shown = SpreadMap.of(deviation)
        return [shown, gr.Radio(value="volume", visible=True), shown.bar(), download]

    def cut(
        self,
        plane: Plane,
        volume: Volume | None,
        index: float,
        window: str,
        spread: SpreadMap | None = None,
        what: str = "volume",
    ) -> Any:
        """One slice of the volume, or of the spread of the draws."""
        if volume is None:
            return None
        if what == "spread" and spread is not None:
            return spread.slice_picture(plane, int(index))
        return slice_picture(volume, plane, int(index), window)

    def example(self) -> list[Any]:
        """The synthetic radiographs as if they had been uploaded: file, inversion and flip of each view in turn."""
        return [
            value
            for view, data in self._example_files.items()
            for value in (_keep(data, f"synthetic-{view}.png"), "auto", False)
        ]

    @functools.cached_property
    def _example_files(self) -> dict[str, bytes]:
        return example.files(self._backend.description)

    def _prepare(self, view: str, given: Given) -> Float32[np.ndarray, "px px"]:
        if given.path is None:
            raise ConfigError(f"the {view} radiograph is missing: choose a file for it")
        try:
            data = Path(given.path).read_bytes()
        except FileNotFoundError as error:
            raise ConfigError(f"the {view} radiograph is no longer here: choose its file again") from error
        image = read(data, view, self._limits, view=view, invert=given.invert, flip=given.flip)
        return prepared_one(image, view, self._backend.description)

    def _prepare_all(self, given: list[Given]) -> Float32[np.ndarray, "views px px"]:
        return np.stack([self._prepare(view, one) for view, one in zip(self._backend.views, given, strict=True)])

    def _checks(self, prepared: Float32[np.ndarray, "views px px"], volume: Volume) -> list[Any]:
        description = self._backend.description
        made = reprojections(volume, description.grid, description.geometry)
        return [beside(enlarge(image), picture) for image, picture in zip(prepared, made, strict=True)]

    def _download(self, volume: Volume, name: str) -> Any:
        return gr.DownloadButton(value=_keep(self._backend.nifti(volume), name), visible=True)


def sentence(error: Exception) -> str:
    """An error's message as a sentence."""
    text = str(error)
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _keep(data: bytes, name: str) -> str:
    """Write where Gradio may read it and deletes it in time; returns the path."""
    return str(save_bytes_to_cache(data, name, get_upload_folder()))
