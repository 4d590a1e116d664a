"""What a request prefers: the media type of its response by Accept, and a job by Prefer."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import HTTPException

RESPOND_ASYNC = "respond-async"
"""The preference of RFC 7240 for a response before the work is done."""


def prefers_async(prefer: str) -> bool:
    """Whether a header Prefer has `respond-async`."""
    return any(part.partition(";")[0].strip().lower() == RESPOND_ASYNC for part in prefer.split(","))


def negotiated(accept: str, offered: Sequence[str]) -> str:
    """The offered media type that a request prefers, the first one if it accepts any.

    Raises:
        HTTPException: 406, none is accepted.
    """
    for media_range, weight in sorted(_ranges(accept), key=lambda item: -item[1]):
        for media_type in offered:
            if weight > 0 and media_range in (media_type, f"{media_type.partition('/')[0]}/*", "*/*"):
                return media_type
    raise HTTPException(406, f"Accept is {accept:.100}: accept one of {', '.join(offered)}")


def _ranges(accept: str) -> list[tuple[str, float]]:
    """Media ranges and their weights."""
    ranges = []
    for part in accept.split(","):
        media_range, *parameters = (word.strip().lower() for word in part.split(";"))
        weight = next((word[2:] for word in parameters if word.startswith("q=")), "1")
        try:
            ranges.append((media_range or "*/*", float(weight)))
        except ValueError:
            ranges.append((media_range, 0.0))
    return ranges
