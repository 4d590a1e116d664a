"""The web page: radiographs in, slices and a NIfTI file out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gradio as gr

from raylift.datasets.geometry import View
from raylift.datasets.radiographs.decoding import RadiographLimits
from raylift.datasets.radiographs.orientation import projected
from raylift.serve.api.routes import DISCLAIMER, Backend
from raylift.serve.page.events import HANGING, Actions
from raylift.serve.page.gradio_patch import Blocks
from raylift.serve.page.images import PLANES, WINDOWS
from raylift.serve.page.std_map import MEANING

NOTICE = "two views do not determine a volume, and it says nothing when it is wrong."
PROJECTED = "The network was trained on radiographs projected from CT. Real ones are outside what it learned, "
TAKEN = "The network was trained on radiographs alone, and its volumes were never compared with CT of their people; "
DIRECTIONS = {
    "axial": "superior to inferior",
    "coronal": "anterior to posterior",
    "sagittal": "right to left",
}
KEPT_S = 3600
"""How long uploads, downloads and volumes are kept for an open page."""
DRAWS = 4
"""Asked for unless the visitor wants another number."""
PEOPLE = 64
"""Pages whose volumes are kept at once."""
PRIVATE: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 16}


def build(backend: Backend, limits: RadiographLimits) -> gr.Blocks:
    """The page for one model."""
    actions = Actions(backend, limits)
    page: gr.Blocks
    with Blocks(title="raylift", analytics_enabled=False, delete_cache=(KEPT_S // 6, KEPT_S)) as page:
        gr.Markdown(f"# raylift\nA CT volume of the chest from {' and '.join(backend.views)} radiographs.")
        gr.Markdown(_notice(backend), elem_id="notice")
        given = _radiographs(actions, backend.description.geometry.views, limits)
        samples = [_samples(backend.max_samples)] if backend.draws else []
        with gr.Row():
            go = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct", scale=2)
            example = gr.Button("Use a synthetic example", elem_id="example", scale=1)
        example.click(actions.example, None, given, **PRIVATE)
        given = [*given, *samples]
        shown, results = _results(actions, backend)
        _on_reconstruct(go, actions, given, shown)
        # A volume belongs to the radiographs above it.
        gr.on([one.change for one in given], lambda: gr.Column(visible=False), None, results, queue=False, **PRIVATE)
        gr.Markdown(_about(backend), elem_id="about")
    page.state_session_capacity = PEOPLE
    return page


def _radiographs(actions: Actions, views: Sequence[View], limits: RadiographLimits) -> list[Any]:
    """The first step; returns file, inversion and flip of each view in turn."""
    gr.Markdown(f"## 1. Radiographs\nDICOM, PNG, JPEG, TIFF or BMP, up to {limits.max_bytes >> 20} MB each.")
    given: list[Any] = []
    with gr.Row(equal_height=False):
        for view in views:
            with gr.Column(min_width=320), gr.Group():
                given += _radiograph(actions, view.name, projected(view) is not None)
    return given


def _radiograph(actions: Actions, view: str, is_lateral: bool) -> list[Any]:
    upload = gr.File(label=f"{view.capitalize()} radiograph", height=132, elem_id=f"{view}-file")
    problem = gr.Markdown(visible=False, elem_id=f"{view}-problem", elem_classes="problem")
    preview = gr.Image(
        label=f"{view.capitalize()}, as the network sees it",
        alt_text=f"{view} radiograph as the network sees it",
        interactive=False,
        visible=False,
        format="png",
        elem_id=f"{view}-preview",
        elem_classes=["picture", "preview"],
        buttons=["fullscreen"],
    )
    with gr.Row(elem_classes="controls"):
        invert = gr.Radio(
            ["auto", "yes", "no"],
            value="auto",
            label="Invert",
            info="Bone must be bright.",
            elem_id=f"{view}-invert",
            min_width=160,
        )
        flip = gr.Checkbox(label="Flip left and right", info=HANGING.get(view), elem_id=f"{view}-flip", min_width=160)
    given = [upload, invert, flip]
    look: dict[str, Any] = {
        "fn": partial(actions.look, view),
        "inputs": given,
        "outputs": [preview, problem],
        **PRIVATE,
    }
    gr.on([invert.change, flip.change], **look)
    if is_lateral:
        # What the new file shows first, so that the preview is of the image as it will be used.
        upload.change(partial(actions.face, view), [upload, invert], flip, **PRIVATE).then(**look)
    else:
        upload.change(**look)
    return given


def _samples(most: int) -> Any:
    """How many draws a volume is the mean of."""
    return gr.Slider(
        1,
        most,
        value=min(DRAWS, most),
        step=1,
        label="Draws",
        info="The volume is their mean. From two draws on, the page shows where they differ. Each takes its time.",
        elem_id="samples",
        buttons=[],
    )


def _results(actions: Actions, backend: Backend) -> tuple[list[Any], Any]:
    """The second step, hidden until there is a volume; returns what a reconstruction fills, and the whole."""
    with gr.Column(visible=False, elem_id="results") as results:
        gr.Markdown("## 2. Volume")
        facts = gr.Markdown(elem_id="facts")
        volume = gr.State(time_to_live=KEPT_S)
        with gr.Row(equal_height=True):
            window = gr.Radio(
                [(f"{name} {w.width_hu:g} / {(w.low_hu + w.high_hu) / 2:g}", name) for name, w in WINDOWS.items()],
                value="wide",
                label="Window: width / level in HU",
                elem_id="window",
                scale=3,
            )
            download = gr.DownloadButton("Download NIfTI", elem_id="download", variant="primary", scale=1)
        spread, choice = _spread() if backend.draws else ([], [])
        with gr.Row():
            for plane in PLANES:
                with gr.Column(min_width=280), gr.Group():
                    cut = partial(actions.cut, plane)
                    _slice_viewer(plane, backend.description.grid.size, cut, volume, [window, *choice])
        gr.Markdown(
            "## 3. Does it fit the radiographs?\n"
            "Each radiograph beside the projection of the volume along the same rays."
        )
        with gr.Row():
            checks = [
                gr.Image(
                    label=f"{view.capitalize()}: given, and projected from the volume",
                    alt_text=f"{view} radiograph beside the projection of the volume",
                    interactive=False,
                    format="png",
                    min_width=320,
                    elem_id=f"{view}-check",
                    elem_classes="picture",
                    buttons=["fullscreen"],
                )
                for view in backend.views
            ]
    return [volume, results, facts, *checks, download, *spread], results


def _spread() -> tuple[list[Any], list[Any]]:
    """The switch between volume and spread; returns what a reconstruction fills, and what slices depend on."""
    shown = gr.State(time_to_live=KEPT_S)
    with gr.Row(equal_height=True):
        what = gr.Radio(
            [("Volume", "volume"), ("Spread of the draws", "spread")],
            value="volume",
            label="Slices show",
            visible=False,
            elem_id="what",
            scale=3,
        )
        download = gr.DownloadButton("Download spread", visible=False, elem_id="download-spread", scale=1)
    with gr.Column(visible=False, elem_id="spread") as key:
        bar = gr.HTML(elem_id="bar")
        gr.Markdown(MEANING, elem_id="meaning")
    what.change(lambda name: gr.Column(visible=name == "spread"), what, key, queue=False, **PRIVATE)
    return [shown, what, bar, download], [shown, what]


def _slice_viewer(plane: str, size: int, cut: Callable[..., Any], volume: Any, choices: list[Any]) -> None:
    """A slice and its slider; drawn anew when the volume or one of the choices changes."""
    picture = gr.Image(
        label=plane.capitalize(),
        alt_text=f"{plane} slice",
        interactive=False,
        format="png",
        elem_id=f"{plane}-slice",
        elem_classes="picture",
        buttons=["fullscreen"],
    )
    slider = gr.Slider(
        0,
        size - 1,
        value=size // 2,
        step=1,
        label=f"Slice, {DIRECTIONS[plane]}",
        elem_id=f"{plane}-slider",
        buttons=[],
    )
    gr.on(
        [slider.change, volume.change, *(choice.change for choice in choices)],
        cut,
        [volume, slider, *choices],
        picture,
        show_progress="hidden",
        trigger_mode="always_last",
        **PRIVATE,
    )


def _on_reconstruct(go: Any, actions: Actions, given: list[Any], shown: list[Any]) -> None:
    """The button says that it works, and cannot be pressed meanwhile; then the page moves to the volume."""
    at_once: dict[str, Any] = {"inputs": None, "outputs": go, "queue": False, "show_progress": "hidden", **PRIVATE}
    busy = go.click(lambda: gr.Button("Reconstructing …", interactive=False), **at_once)
    made = busy.then(actions.reconstruct, given, shown, show_progress="hidden", **PRIVATE)
    # Not `then`, which Gradio 6 leaves out after a failure.
    for ended in (made.success, made.failure):
        ended(lambda: gr.Button("Reconstruct", interactive=True), **at_once)
    made.success(None, js="() => document.getElementById('results').scrollIntoView({behavior: 'smooth'})")


def _notice(backend: Backend) -> str:
    taken = backend.description.provenance.get("archive_holds") == "radiographs"
    return f"**{DISCLAIMER}** {TAKEN if taken else PROJECTED}{NOTICE}"


def _about(backend: Backend) -> str:
    description, geometry = backend.description, backend.description.geometry
    steps = backend.consistency_steps
    draw = backend.draw
    drawn = f", drawn by {draw.sampler} in {draw.steps} steps from seed {draw.seed}" if draw else ""
    fitted = f", fitted to the radiographs in up to {steps} steps" if steps else ""
    distances = f"source to axis {geometry.source_axis_mm:g} mm, source to detector {geometry.source_detector_mm:g} mm"
    return (
        f"Model {description.system.name}: {description.grid.size}³ voxels of {description.grid.spacing_mm:g} mm, "
        f"{description.window.low_hu:g} to {description.window.high_hu:g} HU, trained for "
        f"{distances if geometry.beam == 'cone' else 'parallel rays'}{drawn}{fitted}. "
        f"Weights SHA-256 `{backend.sha256[:16]}…`. "
        "The same service answers `POST /v1/reconstructions`: see [the API's manual](/docs)."
    )
