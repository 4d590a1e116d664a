"""Each radiograph and the reprojection of the volume: side by side, swiped, overlaid, or their difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from urllib.parse import quote

MODES = {"side-by-side": "Side by side", "swipe": "Swipe", "overlay": "Overlay", "difference": "Difference"}


def markup(images: Mapping[str, Sequence[str]]) -> str:
    """HTML with the images of each view and the choice of a mode, which the style sheet applies.

    Args:
        images: paths of radiograph and reprojection by view, as files that Gradio may serve.
    """
    modes = "".join(
        f'<label><input type="radio" name="comparison" value="{mode}"{" checked" * (mode == "side-by-side")}>'
        f"{text}</label>"
        for mode, text in MODES.items()
    )
    figures = "".join(_figure(view, *paths) for view, paths in images.items())
    return (
        '<div class="comparison" role="group" aria-label="Radiographs and reprojections">'
        f"<fieldset><legend>Comparison</legend>{modes}</fieldset>"
        f'<div class="pairs">{figures}</div>'
        '<p class="difference-note">Absolute difference of the two images as shown: black where they are equal.</p>'
        "</div>"
    )


def _figure(view: str, radiograph: str, reprojection: str) -> str:
    name = escape(view)
    sources = [f"gradio_api/file={quote(path)}" for path in (radiograph, reprojection)]
    return (
        f'<figure id="{name}-comparison"><div class="pair">'
        f'<img class="radiograph" src="{sources[0]}" alt="{name} radiograph">'
        f'<img class="reprojection" src="{sources[1]}" alt="{name} reprojection of the volume"></div>'
        f'<input type="range" min="0" max="100" value="50" aria-label="{name}: radiograph to reprojection">'
        f'<figcaption>{name.capitalize()}<span class="sides">: radiograph (left), reprojection (right)</span>'
        "</figcaption></figure>"
    )
