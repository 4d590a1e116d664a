"""From a radiograph file to network input: decoded, oriented, cropped, resized and normalized.

Archives, the command line, the API and the page all use `load_radiograph` and `prepare`, so training and inference get
the same pixels from the same file, bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from torch.nn import functional as F

from raylift.datasets.geometry import View
from raylift.datasets.intensity import Normalization, normalize
from raylift.datasets.radiographs.annotations import remove_annotations
from raylift.datasets.radiographs.borders import crop_bright_border
from raylift.datasets.radiographs.decoding import (
    DEFAULT_RADIOGRAPH_LIMITS,
    Inversion,
    read,
    read_file,
)
from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.datasets.radiographs.histogram import Quantiles, normalize_and_match
from raylift.datasets.radiographs.input_checks import check_radiograph
from raylift.datasets.radiographs.orientation import OrientedRadiograph, PatientFacingOption, orient, orient_by_tag


def load_radiograph(
    source: Path | bytes,
    view: View,
    *,
    limits: RadiographLimits = DEFAULT_RADIOGRAPH_LIMITS,
    invert: Inversion = "auto",
    flip: bool = False,
    patient_facing: PatientFacingOption | None = "auto",
) -> OrientedRadiograph:
    """A radiograph file as a bone-bright image of any size, oriented as its view.

    Args:
        source: the file or its bytes; messages name the path, or for bytes the view.
        view: the pose that the image must match.
        limits: largest file and image accepted.
        invert: see `decoding.read`.
        flip: flip left and right, after PatientOrientation was applied.
        patient_facing: see `orientation.orient`; left or right are the edge in the file and override
            PatientOrientation, by which the image is then only rotated upright.

    Raises:
        FileError: not a supported image, outside the limits, or constant.
    """
    if isinstance(source, bytes):
        name, decoded = view.name, read(source, view.name, limits, view=view.name, invert=invert)
    else:
        name, decoded = str(source), read_file(source, limits, view=view.name, invert=invert)
    if decoded.patient_orientation is None:
        upright = OrientedRadiograph(decoded.pixels)
    else:
        is_given = patient_facing in ("left", "right") and view.is_lateral
        upright = orient_by_tag(decoded.pixels, decoded.patient_orientation, view, name, flip=not is_given)
    image = np.ascontiguousarray(upright.image[:, ::-1]) if flip else upright.image
    is_oriented = decoded.patient_orientation is not None and patient_facing == "auto"
    oriented = replace(upright, image=image) if is_oriented else orient(image, view, patient_facing)
    return replace(
        oriented,
        checks=check_radiograph(image, view.name),
        patient=decoded.patient,
        notes=decoded.notes + upright.notes,
    )


def prepare(
    image: Float32[np.ndarray, "rows columns"],
    size: int,
    reference: Quantiles | None = None,
    normalization: Normalization = "percentiles",
) -> Float32[np.ndarray, "size size"]:
    """A bone-bright image in [0, 1] on a square of `size` pixels, as archives store it and networks take it.

    In this order: bright border cropped, burned-in annotations removed, padded with zeros to a square, resized with
    anti-aliasing, normalized and, with `reference`, its histogram matched.

    The digitally reconstructed radiographs (DRRs) that networks are trained on contain the air around the patient, so a
    dark margin is kept: collimation cannot be distinguished from air, nor from the end of a CT. Only a border that
    cannot be air is cropped: rows and columns at the edges as bright as the densest bone, as masks of inverted images
    and borders of scanned films are. A DRR of `size` pixels comes out as `intensity.normalize` gives it.
    """
    clean = remove_annotations(crop_bright_border(image))
    # Dividing by the maximum keeps zero where it is, so nothing may be clipped before.
    pixels = torch.from_numpy(normalize(clean) if normalization == "percentiles" else clean)[None, None]
    # Pooling by a whole factor first, so that a large image is never padded at full resolution.
    pixels = F.avg_pool2d(pixels, max(1, max(pixels.shape) // (8 * size)))
    rows, columns = pixels.shape[2:]
    side = max(rows, columns)
    top, left = (side - rows) // 2, (side - columns) // 2
    square = F.pad(pixels, (left, side - columns - left, top, side - rows - top))
    resized = F.interpolate(square, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return normalize_and_match(resized[0, 0].numpy(), reference, normalization)
