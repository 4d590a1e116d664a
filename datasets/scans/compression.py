"""Inflating of gzip and zlib streams to their end, so that truncated and damaged voxels are noticed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

GZIP_MAGIC = b"\x1f\x8b"
BLOCK = 2**20


def is_compressed(path: Path) -> bool:
    """Whether the content is gzip, whatever the name of the file."""
    with path.open("rb") as file:
        return file.read(2) == GZIP_MAGIC


def inflate(path: Path, start: int, enough: int, *, zlib_stream: bool = False) -> Iterator[bytes]:
    """Blocks of the content from `start`, inflated if it is gzip, to at most a block beyond `enough` bytes.

    The end of a compressed stream is read where `enough` bytes do not end before it, so its checksum is verified.

    Raises:
        zlib.error: damaged, or it ends inside a compressed stream.
    """
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(BLOCK)
        count = 0
        if not zlib_stream and data[:2] != GZIP_MAGIC:
            while data and count <= enough:
                yield data
                count += len(data)
                data = file.read(BLOCK)
            return
        inflater = zlib.decompressobj(wbits=47)  # gzip or zlib
        while data and count <= enough:
            block = inflater.decompress(data, BLOCK)
            count += len(block)
            yield block
            if inflater.eof:
                # A gzip file may have several members, and trailing zeros.
                data = inflater.unused_data.lstrip(b"\0") or file.read(BLOCK).lstrip(b"\0")
                inflater = zlib.decompressobj(wbits=47) if data else inflater
            else:
                data = inflater.unconsumed_tail or file.read(BLOCK)
        if count <= enough and not inflater.eof:
            raise zlib.error("the compressed stream is truncated")
