"""`raylift systems` and `raylift doctor`: what there is, and what this machine lacks."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from raylift.models.zoo import LITERATURE, SYSTEMS, parameters
from raylift.platform.presets.catalog import PRESETS, listing
from raylift.platform.progress import console


def systems(arguments: list[str]) -> int:
    """Systems of the literature: their names here, sizes and papers."""
    tyro.cli(_Nothing, prog="raylift systems", args=arguments, description=systems.__doc__)
    import torch
    from rich.table import Table

    from raylift.datasets.geometry import Grid, chest
    from raylift.platform.training.memory import GIB, estimate

    table = Table("system", "here as", "kind", "views", "parameters", "GiB to train", "paper")
    for published in LITERATURE:
        grid = Grid(published.size, published.spacing_mm)
        with torch.device("meta"):
            count = parameters(SYSTEMS[published.name]().reconstructor(grid, chest(grid)))
        memory = estimate(PRESETS[published.name]()).total / GIB
        cells = published.title, published.name, published.kind, published.views, f"{count:,}", f"{memory:.1f}"
        table.add_row(*cells, published.paper)
    console.print(table)
    print("parameters: generator at the published settings, with all views; GiB: estimate for the preset of that name")
    print(listing())
    return 0


def doctor(arguments: list[str]) -> int:
    """What is installed and reachable, and what is missing."""
    tyro.cli(_Nothing, prog="raylift doctor", args=arguments, description=doctor.__doc__)
    from raylift.platform.doctor import examine

    findings = examine()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.mark:<4} {finding.name:<{width}}  {finding.text}")
        if finding.remedy:
            print(f"     {'':<{width}}  -> {finding.remedy}")
    return 1 if any(finding.mark == "FAIL" for finding in findings) else 0


@dataclass(frozen=True)
class _Nothing:
    pass
