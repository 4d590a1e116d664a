"""The web page: radiographs in, slices and a NIfTI file out."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from jaxtyping import Float32, Int16

from raylift.datasets.errors import RayliftError
from raylift.datasets.geometry import Grid
from raylift.datasets.ingest import radiographs
from raylift.datasets.phantom import thorax
from raylift.datasets.radiograph import RadiographLimits, prepare, read
from raylift.models.weights import Description
from raylift.serve.figures import PLANES, WINDOWS, enlarge, reprojections, slice_picture
from raylift.serve.reconstructor import nifti

Prepared = Float32[np.ndarray, "views rows columns"]
Volume = Int16[np.ndarray, "d h w"]
Reconstruct = Callable[[Prepared], Awaitable[Volume]]

EXAMPLE_SEED = 7
DISCLAIMER = (
    "Research software, not a medical device: not for diagnosis. The network was trained on radiographs projected from "
    "CT; on real ones it is outside what it learned, and says nothing when it is wrong."
)
CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto; }
footer { display: none !important; }
#disclaimer { font-size: .9rem; opacity: .85; }
.picture img { background: #000; }
"""
FILE_TYPES = [".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm", ".dicom"]


def build(description: Description, sha256: str, reconstruct: Reconstruct, limits: RadiographLimits) -> gr.Blocks:
    """The page for one model; `reconstruct` is awaited with prepared radiographs and gives HU in volume order."""
    views = [view.name for view in description.geometry.views]
    size, grid = description.geometry.detector_px, description.grid
    middle = grid.size // 2

    def look(view: str) -> Callable[[str | None, str, bool], tuple[Any, Any]]:
        """What the network will see of an uploaded file, as an array and as a picture."""

        def show(path: str | None, invert: str, flip: bool) -> tuple[Any, Any]:
            if path is None:
                return None, None
            try:
                image = read(Path(path).read_bytes(), view, limits, invert=invert, flip=flip)  # type: ignore[arg-type]
            except RayliftError as error:
                raise gr.Error(str(error), duration=None) from error
            prepared = prepare(image, size)
            return prepared, enlarge(prepared)

        return show

    def example() -> list[Any]:
        """Both views of a synthetic thorax, and their pictures."""
        images = radiographs(thorax(EXAMPLE_SEED, grid)[0], grid, description.geometry)
        prepared = [prepare(image, size) for image in images]
        return [*prepared, *(enlarge(image) for image in prepared)]

    async def run(*prepared: Float32[np.ndarray, "rows columns"] | None) -> list[Any]:
        missing = [view for view, image in zip(views, prepared, strict=True) if image is None]
        if missing:
            raise gr.Error(f"Give the {' and the '.join(missing)} radiograph first.", duration=None)
        volume = await reconstruct(np.stack([image for image in prepared if image is not None]))
        pictures = [enlarge(image) for image in prepared if image is not None]
        pairs = [(picture, f"{view}: input") for picture, view in zip(pictures, views, strict=True)]
        made = [
            (p, f"{v}: of the volume")
            for p, v in zip(reprojections(volume, grid, description.geometry), views, strict=True)
        ]
        both = [item for pair in zip(pairs, made, strict=True) for item in pair]
        return [volume, both, _download(volume, grid, sha256)]

    def cut(plane: str) -> Callable[[Volume | None, int, str], Any]:
        def show(volume: Volume | None, index: int, window: str) -> Any:
            return None if volume is None else slice_picture(volume, plane, int(index), window)  # type: ignore[arg-type]

        return show

    page: gr.Blocks
    with gr.Blocks(title="raylift", analytics_enabled=False) as page:
        gr.Markdown("# raylift\nA CT volume of the chest from " + " and ".join(views) + " radiographs.")
        gr.Markdown(DISCLAIMER, elem_id="disclaimer")
        prepared_states, previews = [], []
        with gr.Row():
            for view in views:
                with gr.Column():
                    upload = gr.File(
                        label=f"{view.capitalize()} radiograph", file_types=FILE_TYPES, elem_id=f"{view}-file"
                    )
                    with gr.Row():
                        invert = gr.Radio(
                            ["auto", "yes", "no"],
                            value="auto",
                            label="Invert (bone must be bright)",
                            elem_id=f"{view}-invert",
                        )
                        flip = gr.Checkbox(label="Flip left and right", elem_id=f"{view}-flip")
                    preview = gr.Image(
                        label=f"{view.capitalize()}, as the network sees it",
                        interactive=False,
                        format="png",
                        height=300,
                        elem_id=f"{view}-preview",
                        elem_classes="picture",
                        buttons=["fullscreen"],
                    )
                    state = gr.State()
                    gr.on(
                        [upload.change, invert.change, flip.change],
                        look(view),
                        [upload, invert, flip],
                        [state, preview],
                        show_progress="minimal",
                    )
                    prepared_states.append(state)
                    previews.append(preview)
        hint = "A frontal image has the patient's right at its left. "
        if "lateral" in views:
            hint += "A lateral one has the patient facing its left edge: flip it if it does not."
        gr.Markdown(hint)
        with gr.Row():
            go = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct")
            gr.Button("Use a synthetic example", elem_id="example").click(example, None, [*prepared_states, *previews])
        volume = gr.State()
        window = gr.Radio(list(WINDOWS), value="wide", label="HU window", elem_id="window")
        with gr.Row():
            slices = []
            for plane in PLANES:
                with gr.Column():
                    picture = gr.Image(
                        label=plane.capitalize(),
                        interactive=False,
                        format="png",
                        elem_id=f"{plane}-slice",
                        elem_classes="picture",
                        buttons=["fullscreen"],
                    )
                    slider = gr.Slider(
                        0, grid.size - 1, value=middle, step=1, label=f"{plane} slice", elem_id=f"{plane}-slider"
                    )
                    slices.append((plane, picture, slider))
        gallery = gr.Gallery(
            label="Input beside the projection of the volume",
            columns=4,
            height=300,
            elem_id="projections",
            format="png",
        )
        download = gr.DownloadButton("Download NIfTI", interactive=False, elem_id="download")
        for plane, picture, slider in slices:
            gr.on(
                [slider.change, window.change, volume.change],
                cut(plane),
                [volume, slider, window],
                picture,
                show_progress="hidden",
            )
        go.click(run, prepared_states, [volume, gallery, download])
        gr.Markdown(_about(description, sha256))
    return page


def _download(volume: Volume, grid: Grid, sha256: str) -> Any:
    path = Path(tempfile.mkdtemp(prefix="raylift-download-")) / "reconstruction.nii.gz"
    path.write_bytes(nifti(volume, grid, f"raylift {sha256[:12]}, research only"))
    return gr.DownloadButton(value=str(path), interactive=True)


def _about(description: Description, sha256: str) -> str:
    geometry = description.geometry
    distances = f"source-axis {geometry.source_axis_mm:g} mm, source-detector {geometry.source_detector_mm:g} mm"
    return (
        f"Model {description.system.name}, {description.grid.size}³ voxels of {description.grid.spacing_mm:g} mm, "
        f"trained for {distances if geometry.beam == 'cone' else 'parallel rays'}. Weights SHA-256 `{sha256[:16]}…`. "
        "The same service answers `POST /v1/reconstructions`; see [/docs](/docs)."
    )
