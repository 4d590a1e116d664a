"""Findings of the checks of radiographs as HTML: a light, its level in words, and a sentence."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from raylift.datasets.radiographs.finding import Finding, warnings

WORDS = {"ok": "OK", "caution": "Caution", "stop": "Stop"}


def markup(findings: Iterable[Finding], view: str = "") -> str:
    """A line for each finding that is not ok, or one that there is none; lines start with the view if it is given."""
    found = [(finding.level, str(finding)) for finding in warnings(findings)]
    start = f"{view}: " if view else ""
    return "".join(
        f'<p class="light {level}"><b>{WORDS[level]}</b> {escape(start + text)}</p>'
        for level, text in found or [("ok", "no warning of the checks of the input.")]
    )
