"""The report of a reconstruction: one HTML file with radiographs, volume, reprojections and model, without scripts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Int16
from markupsafe import Markup

import raylift
from raylift.platform.reports.page import base64_text
from raylift.platform.reports.page import render as render_page
from raylift.serve.backend import Backend
from raylift.serve.page.result_files import ResultRecord
from raylift.serve.volume_formats import png_sheet

TEMPLATE = "reconstruction.html.j2"


def render(volume: Int16[np.ndarray, "d h w"], record: ResultRecord, backend: Backend) -> str:
    """The report of a volume in HU with the record of its reconstruction."""
    model, description = backend.model, backend.description
    grid, geometry, sampling = description.grid, description.geometry, model.sampling
    rows = {
        "model": model.label,
        "system": description.system.name,
        "SHA-256 of the weights": model.sha256,
        "volume": f"{grid.size}^3 voxels of {grid.spacing_mm:g} mm, {volume.min()} to {volume.max()} HU",
        "views": ", ".join(f"{view.name} (azimuth {view.azimuth_deg:g} degrees)" for view in geometry.views),
        "geometry": f"{geometry.beam} beam",
        "sampler": f"{sampling.sampler}, {sampling.steps} steps, seed {sampling.seed}" if sampling else "none",
        "data-consistency fit": f"up to {model.consistency_steps} steps" if model.consistency_steps else "none",
        "raylift": raylift.__version__,
    }
    images = [
        (view, kind, base64_text(Path(path).read_bytes()))
        for view, paths in record.images.items()
        for kind, path in zip(("radiograph, network input", "reprojection of the volume"), paths, strict=True)
    ]
    return render_page(
        TEMPLATE,
        facts=record.facts,
        checks=Markup(record.checks),  # noqa: S704 - HTML of this service, whose text is escaped
        images=images,
        planes=base64_text(png_sheet(volume, grid)),
        rows=rows,
    )
