"""The one thing about Gradio's pages that a service must not leave to Gradio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder


class Blocks(gr.Blocks):
    """A page whose events take files that were uploaded to it and no others.

    Gradio 6 checks this only for pages that it launched itself. On a mounted page an event may otherwise name any file
    of the machine, or a URL, and have it copied to where the page reads it.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **more: Any) -> Any:
        """Of one event."""
        uploads = Path(get_upload_folder()).resolve()
        for path in _paths(inputs):
            if not Path(path).resolve().is_relative_to(uploads):
                raise gr.Error("A file was named that was not uploaded here.")
        return await super().preprocess_data(block_fn, inputs, *rest, **more)


def _paths(data: Any) -> list[str]:
    if isinstance(data, dict):
        here = [str(data["path"])] if data.get("path") else []
        return here + [path for value in data.values() for path in _paths(value)]
    if isinstance(data, list | tuple):
        return [path for value in data for path in _paths(value)]
    return []
