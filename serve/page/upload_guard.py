"""A Gradio page whose events accept uploaded files only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder


class GuardedBlocks(gr.Blocks):
    """A page whose events accept files that were uploaded to it and no others.

    Gradio 6 checks this only for pages that it launches itself. On a mounted page an event could otherwise name any
    file of the machine or a URL, and Gradio would copy it into the upload folder.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **more: Any) -> Any:
        """Check the files of one event before Gradio reads them."""
        uploads = Path(get_upload_folder()).resolve()
        for path in _paths(inputs):
            if not Path(path).resolve().is_relative_to(uploads):
                raise gr.Error("This file was not uploaded to this page.")
        return await super().preprocess_data(block_fn, inputs, *rest, **more)


def _paths(data: Any) -> list[str]:
    if isinstance(data, dict):
        paths = [str(data["path"])] if data.get("path") else []
        return paths + [path for value in data.values() for path in _paths(value)]
    if isinstance(data, list | tuple):
        return [path for value in data for path in _paths(value)]
    return []
