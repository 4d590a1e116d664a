"""Checks of a radiograph before a volume is reconstructed: is it a radiograph, of a chest, of this view and upright?

They have no weights. Most compare mean values of regions, or the ranks of the mean values of 8 x 8 regions with those
of the mean digitally reconstructed radiograph (DRR) of phantoms, which no tone curve changes. A check of level stop
ends the sequence, since the later ones would repeat it in other words.

The limits were chosen on three real pairs with and without changes, on DRRs of 20 CT scans and 40 phantoms in three
geometries, and on images that `benchmarks/input_checks.py` makes. `docs/explanation/warnings.md` has the error rates on
other ones, and what is not detected.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float, Float32
from scipy import stats
from torch.nn import functional as F

from raylift.datasets.errors import InputCheckError
from raylift.datasets.radiographs.check_result import Bound, CheckResult, Level, warnings
from raylift.datasets.radiographs.chest import contrasts, without_margin
from raylift.datasets.radiographs.orientation import BODY_THRESHOLD, OrientedRadiograph, resample_body

LAYOUTS = {
    "frontal": "55544555 45344354 44355344 33356333 32267323 33478532 36788753 25787652",
    "lateral": "01688861 01776772 03555573 15444564 24554464 24665453 36788762 36777751",
}
"""Mean values of 8 x 8 regions of the mean DRR of phantoms 0 to 9, in ninths; the lateral one faces left."""

ALL_VIEWS = "all views"
"""The key of results for several views together."""
MIN_CORRELATION = 0.5
"""Smallest correlation of diagonal neighbors; noise and text are below."""
MAX_UNIFORM = 0.6
"""Largest fraction of pixels that equal three neighbors, of 256 gray levels; text and screenshots are above."""
MAX_WIDTH = 1.5
"""Largest ratio of width to height without margins. Detectors have up to 1.25, two radiographs side by side more
than this."""
MIN_LAYOUT, MIN_LEAD = 0.25, 0.0
"""Smallest rank correlation with the layout of the view, and its smallest difference from that with the other view."""
MAX_LEAD_OF_OTHER = 0.1
"""Largest rank correlation of an image as one of the other view, inverted or rotated, over that as it is."""
MIN_CONTRAST = {"frontal": 0.04, "lateral": 0.35}
MIN_ABDOMEN = 0.05
"""Smallest contrasts of a chest, as fractions of the image's range."""
MIN_LOWER_WIDTH = 0.64
"""Smallest width of the lower chest over the largest width of the body; skulls and hands are below."""
MAX_OFF_CENTER = 0.13
"""Largest distance of the mediastinum from the middle of the body in a frontal image, as a fraction of its width."""
MAX_SIMILARITY, IDENTICAL = 0.9, 0.999
"""Largest correlation of a frontal and a lateral radiograph, and of other views, whose angles may be close."""


def check_radiograph(image: Float32[np.ndarray, "rows columns"], view: str) -> tuple[CheckResult, ...]:
    """The results of the checks of a bone-bright image of a view, in the file's orientation; the last may be a stop.

    Views that are neither frontal nor lateral have the checks for a radiograph alone.
    """
    results: list[CheckResult] = []
    for result in _checks(without_margin(image), view):
        results.append(result)
        if result.level == "stop":
            break
    return tuple(results)


def check_images(views: Collection[str], images: Iterable[Float32[np.ndarray, "size size"]]) -> CheckResult:
    """Whether two radiographs of the views, prepared as a network's input, are one image."""
    highest = max((_similarity(one, other) for one, other in combinations(images, 2)), default=0.0)
    text = "Two of the views are the same image: give one radiograph of each view."
    limit = MAX_SIMILARITY if set(views) == {"frontal", "lateral"} else IDENTICAL
    return _at_most("same image", highest, limit, text)


def check(
    radiographs: Mapping[str, OrientedRadiograph], prepared: Iterable[Float32[np.ndarray, "size size"]]
) -> dict[str, tuple[CheckResult, ...]]:
    """The results for each view, and those for all of them as of `ALL_VIEWS` where there are several.

    Args:
        radiographs: by view.
        prepared: the same as a network's input, in any order.
    """
    results = {view: radiograph.checks for view, radiograph in radiographs.items()}
    if len(results) == 1:
        return results
    patients = {radiograph.patient for radiograph in radiographs.values() if radiograph.patient}
    text = "The files have different PatientIDs: give radiographs of one patient."
    same = check_images(radiographs.keys(), prepared)
    return results | {ALL_VIEWS: (_at_most("patients", len(patients), 1, text), same)}


def sentences(results: Mapping[str, Iterable[CheckResult]]) -> list[str]:
    """The results that are not ok, with level and view."""
    return [f"{view}: {result.level}: {result}" for view, of_view in results.items() for result in warnings(of_view)]


def require_ok(results: Mapping[str, Iterable[CheckResult]]) -> None:
    """Raise an InputCheckError if a result is not ok."""
    if found := sentences(results):
        raise InputCheckError("; ".join(found))


def _checks(pixels: Float[np.ndarray, "rows columns"], view: str) -> Iterator[CheckResult]:
    text = "Neighboring pixels differ as in noise: this is not a radiograph."
    yield _at_least("noise", _diagonal_correlation(pixels), MIN_CORRELATION, text)
    text = "Most of the image has areas of one gray level, as text and screenshots have: this is not a radiograph."
    yield _at_most("uniform", _uniform(pixels), MAX_UNIFORM, text)
    if view not in LAYOUTS:
        return
    text = "Too wide for one chest radiograph: two radiographs in one image, or a part of the chest is missing."
    yield _at_most("width", pixels.shape[1] / pixels.shape[0], MAX_WIDTH, text)

    own, other = _layout(pixels, view), "lateral" if view == "frontal" else "frontal"
    yield _interpretation(pixels, view, own, other)
    chest = f"This does not look like a {view} chest radiograph"
    contrast = getattr(contrasts(pixels), view)
    missing = {
        "frontal": "no dark lungs on both sides of a bright mediastinum, or one is outside the image",
        "lateral": "shoulders and abdomen are not brighter than the upper corners",
    }
    yield _at_least("lungs", contrast, MIN_CONTRAST[view], f"{chest}: {missing[view]}.")
    yield _at_least("outline", _lower_width(pixels), MIN_LOWER_WIDTH, f"{chest}: the body is much narrower below.")
    text = f"{chest}: below the lungs is no abdomen that is brighter than they are."
    yield _at_least("abdomen", _abdomen(pixels), MIN_ABDOMEN, text)
    text = f"{chest}: its bright and dark regions are in other places."
    yield _at_least("layout", own, MIN_LAYOUT, text)
    yield _at_least("view", own - _layout(pixels, other), MIN_LEAD, text)
    if view == "frontal":
        text = "The mediastinum is not in the middle: a lung may be outside the image, or the patient rotated."
        yield _at_most("off center", _off_center(pixels), MAX_OFF_CENTER, text, "caution")


def _interpretation(pixels: Float[np.ndarray, "rows columns"], view: str, own: float, other: str) -> CheckResult:
    """Whether the image is rather a chest of the other view, inverted or rotated; with the lead over the best of these.

    Args:
        pixels: without margins, in [0, 1].
        view: the view that it must be of.
        own: rank correlation with the layout of that view.
        other: the other view.
    """
    rotated = max((np.rot90(pixels, turns) for turns in (1, 2, 3)), key=lambda image: _layout(image, view))
    # Decoding inverts a file without a photometric interpretation by the contrasts of the view that was stated.
    exchanged = max((pixels, 1 - pixels), key=lambda image: _layout(image, other))
    others = {
        "exchanged": (exchanged, other, f"This looks like a {other} chest radiograph: the two may be exchanged."),
        "inverted": (1 - pixels, view, "Lungs are bright and bone is dark: the radiograph may be inverted."),
        "rotated": (rotated, view, "The radiograph may be rotated: the patient's head must be at the upper edge."),
    }
    leads = {
        name: own - _layout(image, other_view)
        for name, (image, other_view, _) in others.items()
        if _has_lungs(image, other_view)
    }
    name = min(leads, key=leads.__getitem__, default="exchanged")
    return _at_least(name, leads.get(name, 0.0), -MAX_LEAD_OF_OTHER, others[name][2])


def _at_least(name: str, value: float, limit: float, text: str, level: Level = "stop") -> CheckResult:
    return _result(name, value >= limit, level, text, value, limit, "at least")


def _at_most(name: str, value: float, limit: float, text: str, level: Level = "stop") -> CheckResult:
    return _result(name, value <= limit, level, text, value, limit, "at most")


def _result(name: str, ok: bool, level: Level, text: str, value: float, limit: float, bound: Bound) -> CheckResult:
    return CheckResult(name, "ok" if ok else level, "" if ok else text, float(value), limit, bound)


def _diagonal_correlation(pixels: Float[np.ndarray, "rows columns"]) -> float:
    return _correlation(pixels[:-1, :-1], pixels[1:, 1:])


def _uniform(pixels: Float[np.ndarray, "rows columns"]) -> float:
    levels = np.rint(pixels * 255)
    inner = levels[1:-1, 1:-1]
    return float(((inner == levels[:-2, 1:-1]) & (inner == levels[1:-1, :-2]) & (inner == levels[2:, 2:])).mean())


def _layout(pixels: Float[np.ndarray, "rows columns"], view: str) -> float:
    """Rank correlation with the layout of a view; of a lateral one the larger of both directions."""
    regions = F.adaptive_avg_pool2d(torch.from_numpy(np.ascontiguousarray(pixels))[None], 8)[0].numpy()
    layout = np.array([[int(digit) for digit in row] for row in LAYOUTS[view].split()])
    sides = (regions, regions[:, ::-1]) if view == "lateral" else (regions,)
    ranks = stats.rankdata(layout)
    return max(_correlation(stats.rankdata(side), ranks) for side in sides)


def _has_lungs(pixels: Float[np.ndarray, "rows columns"], view: str) -> bool:
    """Whether an image has the contrasts of a chest of a view."""
    contrast = contrasts(pixels)
    enough = (contrast.frontal if view == "frontal" else contrast.lateral) > MIN_CONTRAST[view]
    return enough and _abdomen(pixels) > MIN_ABDOMEN and _layout(pixels, view) > MIN_LAYOUT


def _abdomen(pixels: Float[np.ndarray, "rows columns"]) -> float:
    """Abdomen over chest."""
    # Of 32 rows and columns within the body.
    center = resample_body(pixels)[:, 8:24]
    return float(center[24:31].mean() - center[10:19].mean())


def _lower_width(pixels: Float[np.ndarray, "rows columns"]) -> float:
    """Width of the body in the lower third over its largest width."""
    inside = F.adaptive_avg_pool2d(torch.from_numpy(np.ascontiguousarray(pixels))[None], (32, 64))[0].numpy()
    columns = [np.flatnonzero(row > BODY_THRESHOLD) for row in inside]
    widths = np.array([np.ptp(body) if len(body) else 0 for body in columns])
    return float(np.median(widths[20:31]) / max(widths.max(), 1))


def _off_center(pixels: Float[np.ndarray, "rows columns"]) -> float:
    """Distance of the mediastinum from the middle of the body, as a fraction of its width."""
    columns = resample_body(pixels)[8:20, 6:26].mean(axis=0)
    weights = np.clip(columns - np.median(columns), 1e-9, None)
    return abs(float(np.average(np.arange(6, 26), weights=weights)) / 31 - 0.5)


def _similarity(one: Float[np.ndarray, "size size"], other: Float[np.ndarray, "size size"]) -> float:
    """The larger correlation of an image with another one and its mirror image."""
    return max(_correlation(one, other), _correlation(one, other[:, ::-1]))


def _correlation(one: Float[np.ndarray, "*shape"], other: Float[np.ndarray, "*shape"]) -> float:
    """The correlation coefficient; 0 for a constant image."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.nan_to_num(np.corrcoef(one.ravel(), other.ravel())[0, 1]))
