"""Export a model of `gpu_training.py`, trained in one or several stages, with its card and training data.

    python benchmarks/gpu_export.py models/pretrained/chest-64 --archive data/ct --views 2 \
        --stages 1/unrolled-2.settings.json 2/unrolled-2.settings.json --result benchmarks/results/FILE.md

The archive is of the same CT scans: `raylift ingest FOLDER... --archive data/ct --size 64 --spacing-mm 5`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from raylift.datasets import hashed_json
from raylift.datasets.archive.archive import Archive
from raylift.datasets.geometry import chest
from raylift.datasets.streaming.stream import load_batch
from raylift.models import baselines
from raylift.models.training_data import TrainingData
from raylift.models.weights import DESCRIPTION_FILE, WEIGHTS_FILE, Description, Model, file_sha256
from raylift.models.zoo import SYSTEMS
from raylift.platform.export import export as export_model

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_training import GRID
from training_batches import WINDOW


def export(stages: list[Path], views: int, archive_url: str, folder: Path, result: str) -> None:
    """The last weights of a training in stages as a model that raylift loads, in fp16, with its card.

    Args:
        stages: files `NAME.settings.json` that `gpu_training.py` wrote, each started with the weights of the previous
            one; the folder of the last one has its log and weights.
        views: the first views of the geometry that the model takes.
        archive_url: an archive of the CT, for the digests of the training scans and the fit of the trivial baselines.
        folder: a new folder.
        result: path of the result file in the project.
    """
    settings = [json.loads(stage.read_text()) for stage in stages]
    values, file = last_measurement(stages[-1])
    geometry = chest(GRID)
    geometry = replace(geometry, views=geometry.views[:views])
    system = replace(SYSTEMS["unrolled"].full, views=tuple(view.name for view in geometry.views))
    scans = settings[-1]["scans"]
    archive = Archive(archive_url)
    entries = [entry for entry in archive.entries() if entry.id in scans]
    if len(entries) != len(scans):
        raise SystemExit(f"{archive_url}: {len(entries)} of {len(scans)} scans by name")
    batches = (load_batch(archive, [entry], WINDOW, range(views)) for entry in entries)
    fit = baselines.fit(batches, GRID, geometry)
    collections = "LIDC-IDRI, QIN LUNG CT, Lung-PET-CT-Dx; CC BY"
    phantoms = settings[-1]["phantoms"]
    provenance = {
        "archive": f"{phantoms} phantoms and {len(scans)} CT scans ({collections}), augmented",
        "training_samples": [*scans, *(f"phantom {seed}" for seed in range(phantoms))],
        "step": sum(stage["steps"] for stage in settings),
        "seconds": sum(stage["seconds"] for stage in settings),
        "script": "benchmarks/gpu_training.py",
        "result": result,
        "versions": settings[-1]["versions"],
        "config": {"train": {"batch_size": settings[-1]["batch"], "seed": settings[-1]["seed"]}},
    }
    network = system.reconstruction_network(GRID, geometry)
    network.load_state_dict({name: value.float() for name, value in safetensors.torch.load_file(file).items()})
    prefix = "frontal_" if views == 1 else ""
    kept = {f"{prefix}phantom": "phantom", f"{prefix}val_ct": "val_ct", f"{prefix}test_ct": "test_ct"}
    metrics = {
        f"{name}_{metric}": values[f"{key}_{metric}"] for key, name in kept.items() for metric in ("psnr_db", "ssim")
    }
    description = Description(system, GRID, geometry, WINDOW, provenance=provenance)
    data = TrainingData(frozenset(entry.source_sha256 for entry in entries), fit)
    export_model(Model(network, description, "", data), folder, metrics, dtype=torch.float16)
    write_card(folder, settings, provenance["step"])


def share_weights(folder: Path, other: str) -> None:
    """Replace the weights of an exported model, the same as those of a folder next to it, by that folder's name."""
    head = hashed_json.decode((folder / DESCRIPTION_FILE).read_bytes(), str(folder))
    if file_sha256(folder.parent / other / WEIGHTS_FILE) != head["sha256"]:
        raise SystemExit(f"{folder.parent / other} has other weights than {folder}")
    shared: dict[str, Any] = {}
    for key, value in head.items():
        shared |= {key: value, "weights_of": other} if key == "sha256" else {key: value}
    (folder / DESCRIPTION_FILE).write_bytes(hashed_json.encode(shared))
    (folder / WEIGHTS_FILE).unlink()
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8")
    card.write_text(
        text.replace("`model.safetensors`,", f"`model.safetensors` of `models:{other}`,", 1), encoding="utf-8"
    )


def last_measurement(stage: Path) -> tuple[dict[str, float], Path]:
    """The last metrics of a stage, and the weights that they are of."""
    log = stage.with_name(stage.name.replace(".settings.json", ".jsonl"))
    values = [json.loads(line)["measured"] for line in log.read_text().splitlines() if "measured" in line][-1]
    return values, log.with_suffix(".safetensors")


def write_card(folder: Path, settings: list[dict[str, Any]], steps: int) -> None:
    """Put the settings of this script's stages in the card that `raylift.platform.export` wrote."""
    card = folder / "README.md"
    text, _, _ = card.read_text().partition("## Settings")
    own = "`benchmarks/gpu_training.py`, not `raylift train`: see Settings"
    text = re.sub(r"\| config \| .* \|", f"| trained with | {own} |", text)
    measured = """## Metrics of this checkpoint (protocol `volume`)

Means over 16 held-out phantoms (`phantom`), two validation CT scans (`val_ct`) and three test CT scans (`test_ct`),
without the data-consistency fit, measured by the training script on the GPU in bf16. docs/results.md has the tables of
`raylift evaluate`."""
    text = re.sub(r"## Metrics of this checkpoint.*", measured, text)
    described = json.loads((folder / "model.json").read_text())["model"]
    stages = [{key: value for key, value in stage.items() if key not in ("scans", "versions")} for stage in settings]
    shown = json.dumps({"steps": steps, "stages": stages, "system": described["system"]}, indent=1)
    about = "Each stage started with the weights of the previous one. Its steps are those of the weights kept."
    card.write_text(f"{text}## Settings\n\n{about}\n\n```json\n{shown}\n```\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--stages", type=Path, nargs="+", required=True)
    parser.add_argument("--views", type=int, default=2, help="the first views that the model takes")
    parser.add_argument("--archive", required=True)
    parser.add_argument("--result", required=True, help="the file of benchmarks/results that describes the training")
    parser.add_argument("--weights-of", default="", help="the folder next to FOLDER that has the same weights")
    options = parser.parse_args()
    export(options.stages, options.views, options.archive, options.folder, options.result)
    if options.weights_of:
        share_weights(options.folder, options.weights_of)


if __name__ == "__main__":
    main()
