"""Results of the checks of radiographs as HTML: a light, its level in words, and a sentence."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from raylift.datasets.radiographs.check_result import CheckResult, warnings

WORDS = {"ok": "OK", "caution": "Caution", "stop": "Stop"}


def markup(checks: Iterable[CheckResult], view: str = "") -> str:
    """A line for each result that is not ok, or one that there is none; lines start with the view if it is given."""
    found = [(check.level, str(check)) for check in warnings(checks)]
    start = f"{view}: " if view else ""
    return "".join(
        f'<p class="light {level}"><b>{WORDS[level]}</b> {escape(start + text)}</p>'
        for level, text in found or [("ok", "no warning of the checks of the input.")]
    )
