"""Event handlers of the page, independent of its layout."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder
from jaxtyping import Float32, Int16

from raylift.datasets.errors import ConfigError, RayliftError
from raylift.datasets.radiographs import input_checks
from raylift.datasets.radiographs.check_result import warnings
from raylift.datasets.radiographs.decoding import Inversion
from raylift.datasets.radiographs.orientation import OrientedRadiograph, PatientFacingOption
from raylift.serve.backend import Backend
from raylift.serve.failures import ServiceUnavailableError
from raylift.serve.image_decoder import ImageDecoder
from raylift.serve.images import (
    Plane,
    reprojections,
    slice_image,
    to_displayed,
    with_orientation_letters,
)
from raylift.serve.page import comparison, example, result_files, traffic_light
from raylift.serve.page.result_files import STEM, ResultFiles, ResultRecord
from raylift.serve.page.std_map import StdMap
from raylift.serve.page.upload_quota import size_of
from raylift.serve.page.volume_downloads import links
from raylift.serve.reconstructor import format_residuals
from raylift.serve.served_model import ReconstructionSettings
from raylift.serve.view_text import edge_letters, requirement
from raylift.serve.volume_formats import NIFTI, read_nifti

Volume = Int16[np.ndarray, "d h w"]


class ViewInput(NamedTuple):
    """The controls of one view."""

    path: str | None
    invert: Inversion
    flip: bool


class Actions:
    """The event handlers for one model. They keep no state of a session, so sessions can run concurrently.

    Attributes:
        files: writes the files of previews, slices and results.
    """

    def __init__(
        self,
        backend: Backend,
        decoder: ImageDecoder,
        max_stored_bytes: float = math.inf,
        retention_s: float = 3600.0,
    ) -> None:
        self._backend, self._decoder = backend, decoder
        self._max_stored_bytes, self._retention_s = max_stored_bytes, retention_s
        self.files = ResultFiles()

    async def preview(self, view: str, path: str | None, invert: Inversion, flip: bool) -> list[Any]:
        """The network's input for a radiograph, the error message if there is none, and the results of the checks."""
        hidden = gr.HTML(visible=False)
        if path is None:
            return [gr.Image(value=None, visible=False), gr.Markdown(visible=False), hidden]
        try:
            loaded = await self._load(view, ViewInput(path, invert, flip))
        except RayliftError as error:
            return [
                gr.Image(value=None, visible=False),
                gr.Markdown(sentence(error), visible=True, elem_classes="problem"),
                hidden,
            ]
        letters = edge_letters(self._backend.description.geometry.view(view))
        image = with_orientation_letters(to_displayed(loaded.image), letters)
        notes = "File as read: " + "; ".join(loaded.notes) + "."
        return [
            gr.Image(value=self.files.write_image(image), visible=True),
            gr.Markdown(notes, visible=bool(loaded.notes), elem_classes="note"),
            gr.HTML(traffic_light.markup(loaded.checks), visible=True),
        ]

    async def assign(self, paths: list[str] | None) -> list[Any]:
        """The frontal and the lateral upload from one or two files in any order, and the upload of both, emptied."""
        chosen: list[str | None] = [*(paths or [])]
        if len(chosen) > 2:
            gr.Warning("Choose one frontal and one lateral radiograph.")
            return [gr.skip(), gr.skip(), None]
        frontal, lateral = chosen + [None] * (2 - len(chosen))
        as_chosen = [await self._is_exchanged("frontal", frontal), await self._is_exchanged("lateral", lateral)]
        if any(as_chosen):
            otherwise = [await self._is_exchanged("frontal", lateral), await self._is_exchanged("lateral", frontal)]
            if sum(otherwise) < sum(as_chosen):
                frontal, lateral = lateral, frontal
        return [gr.skip() if path is None else path for path in (frontal, lateral)] + [None]

    async def _is_exchanged(self, view: str, path: str | None) -> bool:
        """Whether a file states or looks like another view than this one."""
        if path is None:
            return False
        try:
            loaded = await self._load(view, ViewInput(path, "auto", flip=False))
        except RayliftError:
            return False  # the preview shows the error
        return any(check.name == "exchanged" and check.level != "ok" for check in loaded.checks)

    async def suggest_flip(self, view: str, result: list[Any] | None, path: str | None, invert: Inversion) -> Any:
        """The flip control of a newly chosen lateral radiograph, set if the patient clearly faces the other edge.

        The radiograph of this view in the result that is shown has the flip of that result.
        """
        pose = self._backend.description.geometry.view(view)
        own = 3 * self._backend.model.views.index(view)
        if result and path == result[own]:
            return gr.Checkbox(value=result[own + 2], info=requirement(pose))
        try:
            loaded = await self._load(view, ViewInput(path, invert, flip=False), "auto") if path else None
        except RayliftError:
            loaded = None  # the preview shows the error
        if loaded is None or not loaded.is_clear:
            ambiguous = "" if loaded is None else " The orientation of this image could not be detected."
            return gr.Checkbox(value=False, info=requirement(pose) + ambiguous)
        if not loaded.detected:
            return gr.Checkbox(value=False, info=requirement(pose) + " Oriented by the file's PatientOrientation.")
        flipped = "; the image was flipped" if loaded.flipped else ""
        detected = f" Detected: patient faces {loaded.patient_facing}{flipped}."
        return gr.Checkbox(value=loaded.flipped, info=requirement(pose) + detected)

    async def reconstruct(self, request: gr.Request | None, *values: Any) -> list[Any]:
        """All outputs of a reconstruction; its files and their record are stored.

        Args:
            request: whose user alone may open the result again.
            values: file path, inversion and flip of each view in turn; of a diffusion model also the number of
                samples.
        """
        started = time.monotonic()
        views = len(self._backend.model.views)
        inputs = [ViewInput(*values[3 * k : 3 * k + 3]) for k in range(views)]
        samples = int(values[3 * views]) if len(values) > 3 * views else 1
        settings = ReconstructionSettings(max(1, min(samples, self._backend.model.max_samples)))
        try:
            if await asyncio.to_thread(size_of, Path(get_upload_folder())) >= self._max_stored_bytes:
                raise ServiceUnavailableError("the service has no space for further results: try again later")
            async with self._backend.slot(self._backend.model.weight(settings)):
                loaded = [
                    await self._load(view, upload)
                    for view, upload in zip(self._backend.model.views, inputs, strict=True)
                ]
                prepared = np.stack([radiograph.image for radiograph in loaded])
                checks = input_checks.check(dict(zip(self._backend.model.views, loaded, strict=True)), prepared)
                if self._backend.strict:
                    input_checks.require_ok(checks)
                result = await self._backend.reconstruct(prepared, settings)
            seconds, volume = time.monotonic() - started, result.hu
            images, encoded, std = await asyncio.gather(
                asyncio.to_thread(self._images, prepared, volume),
                asyncio.to_thread(self._backend.encode, volume),
                asyncio.to_thread(self._store_std, result.std),
            )
        except RayliftError as error:
            raise gr.Error(sentence(error), duration=None) from error
        except Exception as error:
            # Gradio would show an empty message.
            raise gr.Error("The service failed; see its log.", duration=None) from error
        grid = self._backend.description.grid
        facts = (
            f"{grid.size}³ voxels of {grid.spacing_mm:g} mm, {volume.min()} to {volume.max()} HU, "
            f"reconstructed in {seconds:.1f} s. "
            "R, L, A, P, S, I: the patient's right, left, anterior, posterior, superior, inferior."
        )
        sampling, samples = self._backend.model.sampling, settings.samples
        if sampling and samples > 1:
            facts += f" Mean of {samples} samples, seeds {sampling.seed} to {sampling.seed + samples - 1}."
        if result.residuals:
            residuals = format_residuals(result.residuals)
            facts += f" Reprojection residual before -> after the data-consistency fit: {residuals}."
        lights = "".join(traffic_light.markup(of_view, view) for view, of_view in checks.items() if warnings(of_view))
        record = ResultRecord([*values], facts, lights or traffic_light.markup(()), images, std, user_of(request))
        stored = await asyncio.to_thread(self.files.write_result, encoded, record)
        return self._outputs(volume, stored, record, result.std)

    def restore(self, identifier: str, request: gr.Request | None) -> list[Any] | None:
        """All inputs and outputs of the stored result of a link; None without a link, or if the result has expired."""
        if not identifier:
            return None
        found = result_files.read(Path(get_upload_folder()).resolve(), identifier, user_of(request))
        if found is None:
            gr.Warning("The result of this link has expired: reconstruct it again.")
            return None
        stored, record = found
        std = read_nifti(Path(record.std)) if record.std else None
        return record.inputs + self._outputs(read_nifti(stored), stored, record, std)

    def _outputs(self, volume: Volume, stored: Path, record: ResultRecord, std: Volume | None) -> list[Any]:
        """All outputs of a reconstruction, in the order of the layout."""
        outputs = [
            stored.parent.name,
            record.inputs,
            volume,
            gr.Column(visible=True),
            record.checks,
            record.facts,
            comparison.markup(record.images),
            gr.DownloadButton(value=str(stored), visible=True),
            links(stored.parent.name, self._retention_s),
        ]
        return outputs + (self._std_outputs(std, record.std) if self._backend.model.multiple_samples else [])

    @staticmethod
    def _std_outputs(std: Volume | None, stored: str | None) -> list[Any]:
        """File and brightest HU of the standard deviation, its map, the switch set to the volume, and the color bar."""
        if std is None:
            return [
                gr.DownloadButton(value=None, visible=False),
                None,
                None,
                gr.Radio(value="volume", visible=False),
                "",
            ]
        std_map = StdMap.of(std)
        download = gr.DownloadButton(value=stored, visible=True)
        return [download, std_map.max_hu, std_map, gr.Radio(value="volume", visible=True), std_map.colorbar()]

    def show_slice(
        self,
        plane: Plane,
        volume: Volume | None,
        index: float,
        window: str,
        std: StdMap | None = None,
        content: str = "volume",
    ) -> Any:
        """One slice of the volume or of the standard deviation over samples."""
        if volume is None:
            return None
        if content == "std" and std is not None:
            return self.files.write_image(std.slice_image(plane, int(index)))
        return self.files.write_image(slice_image(volume, plane, int(index), window))

    def example(self) -> list[Any]:
        """The synthetic radiographs as uploads: file, inversion and flip of each view in turn."""
        return [
            value
            for view, data in self._example_files.items()
            for value in (self.files.write(data, f"synthetic-{view}.png"), "auto", False)
        ]

    @functools.cached_property
    def _example_files(self) -> dict[str, bytes]:
        return example.files(self._backend.description)

    async def _load(
        self, view: str, controls: ViewInput, patient_facing: PatientFacingOption | None = None
    ) -> OrientedRadiograph:
        """The network's input for an upload."""
        if controls.path is None:
            raise ConfigError(f"the {view} radiograph is missing: choose a file")
        pose = self._backend.description.geometry.view(view)
        async with self._decoder.slots:
            try:
                data = await asyncio.to_thread(Path(controls.path).read_bytes)
            except FileNotFoundError as error:
                raise ConfigError(f"the upload of the {view} radiograph has expired: choose the file again") from error
            return await self._decoder.load(data, pose, controls.invert, controls.flip, patient_facing)

    def _images(self, prepared: Float32[np.ndarray, "views px px"], volume: Volume) -> dict[str, list[str]]:
        """Paths of each prepared radiograph and of the reprojection of the volume, by view."""
        description = self._backend.description
        drrs = reprojections(volume, description.grid, description.geometry, description.normalization)
        return {
            view: [self.files.write_image(to_displayed(radiograph)), self.files.write_image(drr)]
            for view, radiograph, drr in zip(self._backend.model.views, prepared, drrs, strict=True)
        }

    def _store_std(self, std: Volume | None) -> str | None:
        """Path of the standard deviation over samples as NIfTI; None for a single sample."""
        return None if std is None else self.files.write(self._backend.encode(std), f"{STEM}-std{NIFTI.suffix}")


def user_of(request: gr.Request | None) -> str | None:
    """The user of a request; None in a service without logins and tokens."""
    user: str | None = request.request.scope.get("user") if request and request.request else None
    return user


def sentence(error: Exception) -> str:
    """An error's message with a capital letter and a full stop."""
    text = str(error)
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
