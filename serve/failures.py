"""Failures of the service, which are no fault of a request."""

from __future__ import annotations

from raylift.datasets.errors import RayliftError


class ServiceUnavailableError(RayliftError, RuntimeError):
    """The service accepts no request now: its queue is full, or the model or the decoder is restarting.

    Attributes:
        retry_after_s: seconds after which a request may succeed.
    """

    def __init__(self, message: str, retry_after_s: int = 5) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DecodingError(RayliftError, RuntimeError):
    """The decoder has a fault."""
