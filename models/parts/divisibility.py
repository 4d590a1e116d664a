"""Checks that sizes and widths divide without remainder, where a network is configured or built."""

from __future__ import annotations

from collections.abc import Sequence

from raylift.datasets.errors import ConfigError


def require_divisible_size(size: int, factor: int, remedy: str, least: int = 2) -> None:
    """Check that `factor` divides a size, in voxels per side, and leaves `least` voxels per side or more.

    Raises:
        ConfigError: it does not; the message ends with the remedy, as in "or fewer encoder stages".
    """
    if size % factor or size < least * factor:
        raise ConfigError(
            f"size {size} is not divisible by {factor} into {least} or more: use a multiple of {factor} from "
            f"{least * factor} up, or {remedy}"
        )


def require_divisible_channels(channels: Sequence[int], heads: int, remedy: str) -> None:
    """Check that the number of attention heads divides each width.

    Raises:
        ConfigError: it does not.
    """
    if any(width % heads for width in channels):
        raise ConfigError(f"{heads} heads do not divide {', '.join(map(str, channels))} channels: {remedy}")
