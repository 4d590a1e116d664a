"""Layout of the web page: uploads, the viewer of the volume, reprojections and downloads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gradio as gr

from raylift.datasets.geometry import View
from raylift.datasets.radiographs.orientation import expected_patient_facing
from raylift.serve.backend import DISCLAIMER, Backend
from raylift.serve.image_decoder import ImageDecoder
from raylift.serve.images import DIRECTIONS, PLANES, WINDOWS
from raylift.serve.page import viewer
from raylift.serve.page.events import Actions
from raylift.serve.page.std_map import EXPLANATION
from raylift.serve.page.upload_guard import GuardedBlocks
from raylift.serve.view_text import in_words, requirement, title

NOTICE = "Radiographs do not determine a volume uniquely, and errors in a volume are not detected."
TRAINED_ON_DRRS = (
    "The network was trained on digitally reconstructed radiographs (DRRs) of CT scans or synthetic phantoms; "
    "real radiographs are outside its training distribution. "
)
TRAINED_ON_RADIOGRAPHS = (
    "The network was trained on radiographs only; its volumes were never compared with CT scans of the same patients. "
)
DEFAULT_SAMPLES = 4
"""Initial value of the slider."""
MAX_SESSIONS = 64
"""Largest number of sessions whose volumes are kept."""
SET_LINK = """(id) => {
  const url = new URL(location);
  url.searchParams.set("volume", id);
  history.replaceState(null, "", url);
}"""
READ_LINK = "() => new URLSearchParams(location.search).get('volume') ?? ''"
PRIVATE: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 16}


def build(
    backend: Backend,
    decoder: ImageDecoder,
    retention_s: float = 3600.0,
    models: str = "",
    max_stored_bytes: float = math.inf,
) -> gr.Blocks:
    """The page for one model.

    Args:
        backend: the model.
        decoder: of the uploads.
        retention_s: how long uploads, downloads and volumes are kept.
        models: HTML with links to the pages of other models.
        max_stored_bytes: largest size of all uploads and results.
    """
    retention = round(retention_s)
    actions = Actions(backend, decoder, max_stored_bytes, retention_s)
    page: gr.Blocks
    with GuardedBlocks(title="raylift", analytics_enabled=False, delete_cache=(retention // 6, retention)) as page:
        gr.Markdown(f"# raylift\nReconstruct a chest CT volume {_from(backend.model.views)}.")
        if models:
            gr.HTML(models, elem_id="models", padding=False)
        gr.Markdown(_notice(backend), elem_id="notice")
        identifier, shown_inputs = gr.Textbox(visible=False), gr.State(time_to_live=retention)
        views = backend.description.geometry.views
        inputs = _radiographs(actions, views, decoder.file_limits.max_bytes, shown_inputs)
        samples = [_samples_slider(backend.model.max_samples)] if backend.model.multiple_samples else []
        with gr.Row():
            go = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct", scale=2, min_width=140)
            example = gr.Button("Synthetic example", elem_id="example", scale=1, min_width=140)
        example.click(actions.example, None, inputs, **PRIVATE)
        inputs = [*inputs, *samples]
        of_results, results, shown = _results(actions, backend, retention)
        outputs = [identifier, shown_inputs, *of_results]
        _on_reconstruct(go, actions, inputs, outputs, shown)
        # The results are visible as long as all inputs are theirs.
        gr.on(
            [component.change for component in inputs],
            lambda shown, *values: gr.Column(visible=shown == [*values]),
            [shown_inputs, *inputs],
            results,
            queue=False,
            **PRIVATE,
        )
        _on_load(page, actions, identifier, [*inputs, *outputs], shown)
        gr.Markdown(_about(backend), elem_id="about")
    page.state_session_capacity = MAX_SESSIONS
    page.temp_file_sets.append(actions.files.paths)
    return page


def _radiographs(actions: Actions, views: Sequence[View], max_bytes: int, shown_inputs: Any) -> list[Any]:
    """Step 1, the uploads; returns file, inversion and flip of each view in turn."""
    gr.Markdown(f"## 1. Radiographs\nDICOM, PNG, JPEG, TIFF or BMP, up to {max_bytes >> 20} MiB each.")
    names = [view.name for view in views]
    both = _both_upload() if names == ["frontal", "lateral"] else None
    inputs: list[Any] = []
    with gr.Row(equal_height=False):
        for view in views:
            with gr.Column(min_width=320), gr.Group():
                inputs += _radiograph(actions, view, shown_inputs)
    if both:
        upload, exchange = both
        uploads = inputs[::3]
        upload.upload(actions.assign, upload, [*uploads, upload], **PRIVATE)
        exchange.click(lambda frontal, lateral: (lateral, frontal), uploads, uploads, **PRIVATE)
    return inputs


def _both_upload() -> tuple[Any, Any]:
    """The upload of both radiographs in any order, and the button that exchanges them."""
    with gr.Row(equal_height=True):
        upload = gr.File(
            label="Both, in any order",
            file_count="multiple",
            height=132,
            elem_id="both-files",
            scale=4,
            min_width=160,
        )
        exchange = gr.Button("Exchange", elem_id="exchange", scale=0, min_width=110)
    return upload, exchange


def _from(views: Sequence[str]) -> str:
    return f"from {in_words(views)} radiographs" if len(views) > 1 else f"from a {views[0]} radiograph"


def _radiograph(actions: Actions, view: View, shown_inputs: Any) -> list[Any]:
    name = view.name
    upload = gr.File(label=f"{title(view)} radiograph", height=132, elem_id=f"{name}-file")
    problem = gr.Markdown(visible=False, elem_id=f"{name}-problem", elem_classes="problem")
    image = gr.Image(
        label=f"{title(view)}, network input",
        alt_text=f"{name} radiograph as prepared for the network",
        interactive=False,
        visible=False,
        format="png",
        elem_id=f"{name}-preview",
        elem_classes=["image-panel", "preview"],
        buttons=["fullscreen"],
    )
    checks = gr.HTML(visible=False, elem_id=f"{name}-checks", elem_classes="checks")
    with gr.Row(elem_classes="controls"):
        invert = gr.Radio(
            ["auto", "yes", "no"],
            value="auto",
            label="Invert",
            info="Bone must be bright.",
            elem_id=f"{name}-invert",
            min_width=160,
        )
        flip = gr.Checkbox(label="Flip left and right", info=requirement(view), elem_id=f"{name}-flip", min_width=160)
    inputs = [upload, invert, flip]
    preview: dict[str, Any] = {
        "fn": partial(actions.preview, name),
        "inputs": inputs,
        "outputs": [image, problem, checks],
        **PRIVATE,
    }
    gr.on([invert.change, flip.change], **preview)
    if expected_patient_facing(view) is not None:
        # The flip is set before the preview, so that the preview shows the network's input.
        suggest = partial(actions.suggest_flip, name)
        upload.change(suggest, [shown_inputs, upload, invert], flip, **PRIVATE).then(**preview)
    else:
        upload.change(**preview)
    return inputs


def _samples_slider(max_samples: int) -> Any:
    """The number of samples."""
    return gr.Slider(
        1,
        max_samples,
        value=min(DEFAULT_SAMPLES, max_samples),
        step=1,
        label="Samples",
        info="The volume is the mean over samples; with two or more, their standard deviation is shown too. "
        "Computing time is proportional to the number.",
        elem_id="samples",
        buttons=[],
    )


def _results(actions: Actions, backend: Backend, retention_s: int) -> tuple[list[Any], Any, list[Any]]:
    """Steps 2 and 3, hidden until there is a volume.

    Returns:
        The outputs of a reconstruction, their column, and the components with what the viewer shows.
    """
    with gr.Column(visible=False, elem_id="results") as results:
        gr.Markdown("## 2. Volume")
        checks = gr.HTML(elem_id="checks", elem_classes="checks")
        facts = gr.Markdown(elem_id="facts")
        volume = gr.State(time_to_live=retention_s)
        gr.HTML(viewer.markup(), elem_id="viewer")
        with gr.Column(elem_id="slices"):
            window = gr.Radio(
                [(f"{name} {w.width_hu:g} / {(w.low_hu + w.high_hu) / 2:g}", name) for name, w in WINDOWS.items()],
                value="wide",
                label="Window: width / level in HU",
                elem_id="window",
            )
            std, choices = _std_controls(retention_s) if backend.model.multiple_samples else ([], [])
            with gr.Row():
                for plane in PLANES:
                    with gr.Column(min_width=280), gr.Group():
                        show = partial(actions.show_slice, plane)
                        _slice_viewer(plane, backend.description.grid.size, show, volume, [window, *choices])
        with gr.Row():
            downloads = _downloads()
            std_files = _std_files() if backend.model.multiple_samples else []
        gr.Markdown(
            "## 3. Consistency with the radiographs\n"
            "Each radiograph and the reprojection of the volume (its DRR in the same geometry)."
        )
        comparisons = gr.HTML(elem_id="comparisons", padding=False)
    return (
        [volume, results, checks, facts, comparisons, *downloads, *std_files, *std],
        results,
        [downloads[0], *std_files],
    )


def _downloads() -> list[Any]:
    """The button with the NIfTI, which the viewer reads, and the links to the other formats."""
    nifti = gr.DownloadButton("Download NIfTI", elem_id="download", variant="primary", scale=0, min_width=200)
    return [nifti, gr.HTML(elem_id="formats", padding=False)]


def _std_files() -> list[Any]:
    """The download of the standard deviation and the HU of its brightest color."""
    download = gr.DownloadButton(
        "Download standard deviation", visible=False, elem_id="download-std", scale=0, min_width=240
    )
    return [download, gr.Number(visible=False)]


def _std_controls(retention_s: int) -> tuple[list[Any], list[Any]]:
    """The switch to the standard deviation; returns the outputs of a reconstruction and the inputs of the slices."""
    std_map = gr.State(time_to_live=retention_s)
    content = gr.Radio(
        [("Volume", "volume"), ("Standard deviation over samples", "std")],
        value="volume",
        label="Slice content",
        visible=False,
        elem_id="slice-content",
    )
    with gr.Column(visible=False, elem_id="std") as legend:
        colorbar = gr.HTML(elem_id="colorbar")
        gr.Markdown(EXPLANATION, elem_id="explanation")
    content.change(lambda name: gr.Column(visible=name == "std"), content, legend, queue=False, **PRIVATE)
    return [std_map, content, colorbar], [std_map, content]


def _slice_viewer(plane: str, size: int, show: Callable[..., Any], volume: Any, choices: list[Any]) -> None:
    """A slice and its slider, updated when the volume or one of the choices changes."""
    slice_image = gr.Image(
        label=plane.capitalize(),
        alt_text=f"{plane} slice",
        interactive=False,
        format="png",
        elem_id=f"{plane}-slice",
        elem_classes="image-panel",
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
        show,
        [volume, slider, *choices],
        slice_image,
        show_progress="hidden",
        trigger_mode="always_last",
        **PRIVATE,
    )


def _on_reconstruct(go: Any, actions: Actions, inputs: list[Any], outputs: list[Any], shown: list[Any]) -> None:
    """Disable the button during a reconstruction, then show the volume and scroll to the results."""
    immediate: dict[str, Any] = {"inputs": None, "outputs": go, "queue": False, "show_progress": "hidden", **PRIVATE}
    busy = go.click(lambda: gr.Button("Reconstructing …", interactive=False), **immediate)
    done = busy.then(actions.reconstruct, inputs, outputs, show_progress="hidden", **PRIVATE)
    # Not `then`, which Gradio 6 skips after a failure.
    for ended in (done.success, done.failure):
        ended(lambda: gr.Button("Reconstruct", interactive=True), **immediate)
    done.success(None, shown, js=viewer.SHOW)
    done.success(None, outputs[0], js=SET_LINK)
    done.success(None, js="() => document.getElementById('results').scrollIntoView({behavior: 'smooth'})")


def _on_load(page: gr.Blocks, actions: Actions, identifier: Any, components: list[Any], shown: list[Any]) -> None:
    """Show the stored result of the page's link, if it has one."""

    def restore(of_link: str, request: gr.Request) -> list[Any]:
        return actions.restore(of_link, request) or [gr.skip()] * len(components)

    restored = page.load(restore, identifier, components, js=READ_LINK, show_progress="hidden", **PRIVATE)
    restored.success(None, shown, js=f"(file, ...rest) => file && ({viewer.SHOW})(file, ...rest)")


def _notice(backend: Backend) -> str:
    radiographs_only = backend.description.provenance.get("archive_contents") == "radiographs"
    return f"**{DISCLAIMER}** {TRAINED_ON_RADIOGRAPHS if radiographs_only else TRAINED_ON_DRRS}{NOTICE}"


def _about(backend: Backend) -> str:
    """The model, its geometry and sampler, and a link to the API reference."""
    description, geometry, sampling = backend.description, backend.description.geometry, backend.model.sampling
    window, steps = description.window, backend.model.consistency_steps
    cone = (
        f"source to isocenter {geometry.source_isocenter_mm:g} mm, "
        f"source to detector {geometry.source_detector_mm:g} mm"
    )
    lines = [
        f"Model: {description.system.name}, {description.grid.size}³ voxels of {description.grid.spacing_mm:g} mm, "
        f"{window.low_hu:g} to {window.high_hu:g} HU.",
        f"Geometry: {'cone beam, ' + cone if geometry.beam == 'cone' else 'parallel beam'}.",
        f"Sampler: {sampling.sampler}, {sampling.steps} steps, seed {sampling.seed}." if sampling else "",
        f"Data-consistency fit: up to {steps} steps." if steps else "",
        f"SHA-256 of the weights: `{backend.model.sha256[:16]}…`.",
        "HTTP API: `POST v1/reconstructions` below the address of this page, see the [API reference](docs).",
    ]
    return " ".join(line for line in lines if line)
