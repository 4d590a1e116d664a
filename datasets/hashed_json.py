"""JSON files that begin with the SHA-256 of the rest of the file, so that a changed byte anywhere is detected."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from raylift.datasets.errors import AlteredFileError

KEY = "file_sha256"
"""The first key of a file: the SHA-256, in hexadecimal, of all bytes after this value."""
_BEGIN = f'{{\n "{KEY}": "'.encode()
_DIGITS = 64


def encode(data: dict[str, Any]) -> bytes:
    """The content of a file."""
    rest = json.dumps({KEY: "", **data}, indent=1).encode()[len(_BEGIN) :]
    return _BEGIN + hashlib.sha256(rest).hexdigest().encode() + rest


def decode(raw: bytes, where: str) -> dict[str, Any]:
    """The data in the content of a file.

    Args:
        raw: the content.
        where: name of the file, for the message.

    Raises:
        AlteredFileError: the content is not what was written.
    """
    stated, rest = raw[len(_BEGIN) : len(_BEGIN) + _DIGITS], raw[len(_BEGIN) + _DIGITS :]
    if not raw.startswith(_BEGIN):
        raise AlteredFileError(f"{where} does not begin with {KEY}: it was damaged or edited, or is not raylift's")
    computed = hashlib.sha256(rest).hexdigest()
    if computed.encode() != stated:
        raise AlteredFileError(
            f"{where} has SHA-256 {computed}, its first line states {stated.decode(errors='replace')}: "
            "it was damaged, cut or edited"
        )
    data: dict[str, Any] = json.loads(raw)
    del data[KEY]
    return data
