"""`raylift models`, `raylift systems` and `raylift doctor`: trained models, systems, and the state of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from raylift.models.zoo import SYSTEMS, parameters
from raylift.platform.presets import PRESETS, listing
from raylift.platform.progress import console


def models(arguments: list[str]) -> int:
    """Pretrained models, which commands take by name."""
    tyro.cli(_NoOptions, prog="raylift models", args=arguments, description=models.__doc__)
    from raylift.models.weights import weights_file
    from raylift.platform import model_store
    from raylift.platform.export import card_metrics

    for name, entry in model_store.MODELS.items():
        url, folder = f"{model_store.PREFIX}{name}", model_store.package_folder(name)
        description = model_store.description_of(url)
        views, grid = description.geometry.views, description.grid
        metrics = card_metrics((folder / model_store.CARD_FILE).read_text(encoding="utf-8"))
        path = weights_file(folder)
        size = f"{path.stat().st_size / 2**20:.1f} MiB" if path.is_file() else "not in the package"
        rows = {
            "title": entry.title,
            "system": description.system.name,
            "views": ", ".join(view.name for view in views),
            "output": f"{grid.size}^3 voxels of {grid.spacing_mm:g} mm",
            "license": entry.license,
            "metrics": ", ".join(f"{metric} {value:g}" for metric, value in metrics.items()),
            "weights": f"{size}, SHA-256 {model_store.sha256_of(url)[:12]}",
            "where": entry.url or str(folder),
            "card": str(folder / model_store.CARD_FILE),
        }
        print(url)
        for title, text in rows.items():
            print(f"  {title:<{max(map(len, rows))}}  {text}")
    print("any command that takes a model takes these names: raylift reconstruct models:NAME ...")
    return 0


@dataclass(frozen=True)
class SystemsOptions:
    """Systems, the published methods and raylift's own: names, presets, parameters, papers."""

    memory: bool = False
    """Add an estimate of the memory that training takes at the published settings (half a minute)."""
    markdown: bool = False
    """Print the table alone, in Markdown, as the documentation has it."""


def systems(arguments: list[str]) -> int:
    """Systems, the published methods and raylift's own: names, presets, parameters, papers."""
    options = tyro.cli(SystemsOptions, prog="raylift systems", args=arguments, description=systems.__doc__)
    from rich.table import Table

    rows = {name: row(name) for name in SYSTEMS}
    columns = list(COLUMNS)
    if options.memory:
        columns.append("GiB to train")
        rows = {name: [*cells, _gib(name)] for name, cells in rows.items()}
    if options.markdown:
        print(markdown(columns, list(rows.values())))
        return 0
    table = Table(*columns)
    for cells in rows.values():
        table.add_row(*cells)
    console.print(table)
    print("parameters: of the generator (of the refiner, its denoiser) at the published settings, with all views")
    flexible = [name for name, entry in SYSTEMS.items() if entry.full.any_views]
    lifted = [name for name in flexible if hasattr(SYSTEMS[name].full, "lifting")]
    print("one to eight views in any pose: " + ", ".join(flexible))
    print("  (--system.views all or NAMES; with --system.lifting.along rays: " + ", ".join(lifted) + ")")
    print(listing())
    return 0


COLUMNS = ("system", "name", "kind", "views", "volume", "parameters", "paper")


def row(name: str) -> list[str]:
    """The cells of a system's row, in the order of `COLUMNS`."""
    import torch

    from raylift.datasets.geometry import Grid, chest

    entry = SYSTEMS[name]
    grid = Grid(entry.training.size, entry.spacing_mm)
    with torch.device("meta"):
        count = parameters(entry.full.reconstruction_network(grid, chest(grid)))
    volume = f"{grid.size}^3, {grid.spacing_mm:g} mm"
    return [entry.title, name, entry.kind, entry.views, volume, f"{count:,}", entry.paper]


def systems_table() -> str:
    """All systems as a table in Markdown."""
    return markdown(COLUMNS, [row(name) for name in SYSTEMS])


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _gib(name: str) -> str:
    from raylift.platform.training.memory import GIB, estimate

    return f"{estimate(PRESETS[name]).total / GIB:.1f}"


def doctor(arguments: list[str]) -> int:
    """Report what is installed and reachable, and what is missing."""
    tyro.cli(_NoOptions, prog="raylift doctor", args=arguments, description=doctor.__doc__)

    from raylift.platform.doctor import run_checks

    checks = run_checks()
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.status:<4} {check.name:<{width}}  {check.text}")
        if check.remedy:
            print(f"     {'':<{width}}  -> {check.remedy}")
    return 1 if any(check.status == "FAIL" for check in checks) else 0


@dataclass(frozen=True)
class _NoOptions:
    pass
