"""A Gradio page that accepts events of its own functions, with uploaded files only."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raylift.serve.api.problem import refuse
from raylift.serve.api.request_limits import route_path

EVENTS = ("/gradio_api/queue/join", "/gradio_api/run/predict")
MAX_EVENT_BYTES = 2**16


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


class KnownEvents:
    """Responds 413 and 422 to events over a size and of no function of the page, for which Gradio has no handler."""

    def __init__(self, app: ASGIApp, functions: Collection[int]) -> None:
        self._app, self._functions = app, functions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or route_path(scope) not in EVENTS:
            await self._app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_EVENT_BYTES:
                await refuse(scope, send, 413, f"the event is over the limit of {MAX_EVENT_BYTES} bytes")
                return
        if not self._is_known(body):
            await refuse(scope, send, 422, "the event is of no function of this page: reload the page")
            return
        replayed = False

        async def receive_again() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receive_again, send)

    def _is_known(self, body: bytes) -> bool:
        try:
            event = json.loads(body)
        except (ValueError, RecursionError):
            return False
        if not isinstance(event, dict) or not isinstance(event.get("data"), list):
            return False
        session, function = event.get("session_hash"), event.get("fn_index")
        return isinstance(session, str) and type(function) is int and function in self._functions


def _paths(data: Any) -> list[str]:
    if isinstance(data, dict):
        paths = [str(data["path"])] if data.get("path") else []
        return paths + [path for value in data.values() for path in _paths(value)]
    if isinstance(data, list | tuple):
        return [path for value in data for path in _paths(value)]
    return []
