"""HTML pages of reports: the templates of `platform/reports/templates`, and what all of them need."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2

DISCLAIMER = "raylift is research software. It is not a medical device and must not be used for diagnosis."

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> str:
    """The page of a template: self-contained HTML with the disclaimer.

    Args:
        template: name of a file in `platform/reports/templates`.
        values: all that the template uses but the disclaimer; text is escaped.
    """
    return _TEMPLATES.get_template(template).render(disclaimer=DISCLAIMER, **values)


def base64_text(png: bytes) -> str:
    """A PNG as text for the address of an image in a page."""
    return base64.b64encode(png).decode()
