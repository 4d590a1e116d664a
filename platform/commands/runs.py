"""`raylift runs`: runs and searches in a folder, with state, best metric, size and the next command."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from raylift.datasets.errors import ConfigError


@dataclass(frozen=True)
class RunsOptions:
    """List runs and searches: state and process, best metric, progress, size, and the next command."""

    url: tyro.conf.Positional[str] = "runs"
    """Folder or URL of runs and searches, or of one of them."""


def runs(arguments: list[str]) -> int:
    """List runs and searches."""
    options = tyro.cli(RunsOptions, prog="raylift runs", args=arguments)
    from raylift.datasets.archive.store import absolute, require_reachable
    from raylift.platform.run_list import overviews

    require_reachable(options.url)
    found = overviews(options.url)
    if not found:
        raise ConfigError(f"{absolute(options.url)} has no run and no search: name the folder of one, or of several")
    for overview in found:
        size = f"{overview.size_bytes / 2**20:.1f} MiB"
        print("  ".join(filter(None, [overview.url, overview.state, overview.progress, overview.best, size])))
        if overview.command:
            print(f"  {overview.command}")
    return 0
