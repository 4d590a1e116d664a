"""The tutorial notebook, executed, as a page: Markdown cells, code, printed text and figures."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import nbformat
from nbclient import NotebookClient

REPOSITORY = Path(__file__).resolve().parents[2]


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh run; an error in a cell is an error here."""
    read = nbformat.read(path, as_version=4)
    with mock.patch.dict(os.environ, PYTHONPATH=str(REPOSITORY), JUPYTER_PLATFORM_DIRS="1"):
        NotebookClient(read, timeout=300, kernel_name="python3").execute()
    return read


def page(path: Path, uri: str) -> Iterator[tuple[str, str | bytes]]:
    """Address and content of the page and of its figures."""
    lines: list[str] = []
    for number, cell in enumerate(execute(path).cells):
        if cell.cell_type == "markdown":
            lines += [cell.source, ""]
            continue
        lines += ["```python", cell.source, "```", ""]
        printed = "".join(output.text for output in cell.outputs if output.output_type == "stream")
        if printed:
            lines += ["```text", printed.rstrip(), "```", ""]
        for output in cell.outputs:
            image = output.get("data", {}).get("image/png")
            if image:
                name = f"{uri.removesuffix('.md')}-{number}.png"
                yield f"images/{name}", base64.b64decode(image)
                lines += [f"![Output of the cell above](images/{name})", ""]
    yield uri, "\n".join(lines)
