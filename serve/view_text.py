"""Views in words and letters, for the API, the page and the command line."""

from __future__ import annotations

from collections.abc import Sequence

from raylift.datasets.geometry import View

SIDES = {
    "right side": ("RL", "the patient's right at the left edge", "The patient's right must be at the left edge."),
    "left side": ("LR", "the patient's left at the left edge", "The patient's left must be at the left edge."),
    "anterior side": ("AP", "the patient facing the left edge", "The patient must face the left edge."),
    "posterior side": ("PA", "the patient facing the right edge", "The patient must face the right edge."),
}
"""By `View.left_edge`: directions at the left and the right edge, orientation in words, and as a requirement."""


def in_words(names: Sequence[str]) -> str:
    """A list of names, as in `frontal, lateral and oblique30`; empty for none."""
    *others, last = names or ("",)
    return f"{', '.join(others)} and {last}" if others else last


def title(view: View) -> str:
    """The name as a heading, with the pose of a view that is neither frontal nor lateral."""
    name = view.name[:1].upper() + view.name[1:]
    return name if view.left_edge else f"{name} ({view.pose})"


def guidance(view: View) -> str:
    """How an image of the view must be oriented; for an oblique, tilted or rolled view its pose."""
    return SIDES[view.left_edge][1] if view.left_edge else f"taken at {view.pose}"


def requirement(view: View) -> str:
    """The same as a sentence."""
    return (
        SIDES[view.left_edge][2] if view.left_edge else f"The image must be taken at {view.pose}, and is used as it is."
    )


def edge_letters(view: View) -> str:
    """The patient directions at the left and the right edge, two letters; none for an oblique view."""
    return SIDES[view.left_edge][0] if view.left_edge else ""
