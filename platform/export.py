"""Export of a checkpoint to a folder with weights, description and a model card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from raylift.datasets.archive.store import local_path
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, View
from raylift.datasets.intensity import Normalization
from raylift.models import weights
from raylift.models.diffusion.diffusion_network import DiffusionNetwork
from raylift.models.weights import Model
from raylift.models.zoo import SYSTEMS
from raylift.platform.model_store import CARD_FILE
from raylift.platform.monitor import PROTOCOL_OF, monitored
from raylift.platform.reports.page import DISCLAIMER

ATTENUATIONS = {"linear": "proportional to HU + 1000", "plastimatch": "as plastimatch's, zero up to -800 HU"}
PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16"}
NORMALIZATIONS: dict[Normalization, str] = {
    "percentiles": "by the image's 0.5 and 99.5 percentiles",
    "maximum": "divided by the image's maximum, in 8 bits",
}
DRR_LIMITS = """It was trained on digitally reconstructed radiographs (DRRs) of CT scans or synthetic phantoms.
Real radiographs differ in scatter, processing and pose. Histogram matching, where it is on (above), corrects the tone
curve alone."""
RADIOGRAPH_LIMITS = """It was trained on real radiographs of unknown pose, scale and processing, and its predictions
were not compared with CT of the same patients."""


def export(model: Model, folder: Path, metrics: dict[str, float], dtype: torch.dtype = torch.float32) -> str:
    """Write the model with its card into an empty or new folder; returns the SHA-256 of the weights.

    Args:
        model: the network and its description.
        folder: created if it does not exist.
        metrics: validation metrics of this checkpoint, by their names in logs.
        dtype: type of the stored floating-point weights.

    Raises:
        ConfigError: the folder is not empty, or a URL.
    """
    if local_path(folder).exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: choose another folder")
    sha256 = weights.save(folder, model.network.state_dict(), model.description, dtype, model.training_data)
    (folder / CARD_FILE).write_text(card(model, sha256, metrics, dtype), encoding="utf-8")
    return sha256


def card(model: Model, sha256: str, metrics: dict[str, float], dtype: torch.dtype = torch.float32) -> str:
    """The model card, in Markdown."""
    description, geometry = model.description, model.description.geometry
    provenance = description.provenance
    paper = SYSTEMS[description.system.name].paper
    count = sum(parameter.numel() for parameter in model.network.parameters())
    beam = (
        f"cone beam, source-isocenter {geometry.source_isocenter_mm:g} mm, "
        f"source-detector {geometry.source_detector_mm:g} mm"
        if geometry.beam == "cone"
        else "parallel beam"
    )
    settings = model.network.sampling if isinstance(model.network, DiffusionNetwork) else None
    sampling = settings and (
        f"sampled: {settings.sampler}, {settings.steps} steps, seed {settings.seed}; other seeds give other samples"
    )
    measured = "\n".join(f"| {name} | {value:.4g} |" for name, value in sorted(metrics.items()))
    of_radiographs = provenance.get("archive_contents") == "radiographs"
    samples = f"{len(provenance.get('training_samples', []))} {'pairs of radiographs' if of_radiographs else 'volumes'}"
    trained_on = provenance.get("imported") or f"{samples} of {provenance.get('archive', 'an unknown archive')}"
    return f"""# {description.system.name}

{DISCLAIMER}

A network that reconstructs a CT volume of the chest from {_radiographs(geometry)}.

| | |
| --- | --- |
| system | {description.system.name} |
| paper | {paper} |
| parameters | {count:,} |
| weights | `{weights.WEIGHTS_FILE}`, {PRECISIONS[dtype]}, SHA-256 `{sha256}` |
| output | {description.grid.size}^3 voxels of {description.grid.spacing_mm:g} mm, HU in \
[{description.window.low_hu:g}, {description.window.high_hu:g}] |
| input | {geometry.detector_px} x {geometry.detector_px}, bone bright; rows from superior to inferior |
| normalization | {NORMALIZATIONS[description.normalization]} |
| views | {"; ".join(_view(view) for view in geometry.views)} |
| histograms | {"matched to DRRs" if description.histograms else "not matched"} |
| geometry | {beam}, detector pitch {geometry.detector_pitch_mm:.4g} mm; attenuation \
{ATTENUATIONS[geometry.attenuation]} |
| prediction | {sampling or "deterministic"} |
| trained on | {trained_on} |
{_started_with(provenance)}| config | SHA-256 `{provenance.get("config_sha256", "not recorded")}` |
| versions | {", ".join(f"{name} {version}" for name, version in provenance.get("versions", {}).items())} |

## Metrics of this checkpoint on the validation split (protocol `{PROTOCOL_OF[monitored(metrics)]}`)

| metric | value |
| --- | --- |
{measured or "| none | |"}

`raylift evaluate` computes metrics on held-out scans, and those of two trivial baselines{_baselines(model)}.

## Limits

{RADIOGRAPH_LIMITS if of_radiographs else DRR_LIMITS}
{_count(len(geometry.views))} not determine a volume: structures that the radiographs do not show are estimated from \
the training data, and small or faint ones may be missing or hallucinated. HU are not calibrated. The training set is \
small and from few scanners; body habitus, age, devices and disease outside it are reconstructed wrongly without any \
sign of it.

## Use

```
raylift reconstruct FOLDER {_files(geometry)} -o ct.nii.gz
raylift serve FOLDER
```

## Settings

```json
{json.dumps(provenance.get("config", {}), indent=1)}
```
"""


def _baselines(model: Model) -> str:
    fit = model.training_data and model.training_data.baselines
    return f", fitted to {fit.volumes} training volumes (`{weights.TRAINING_DATA_FILE}`)" if fit else ""


def _started_with(provenance: dict[str, Any]) -> str:
    """Rows of the models that the training started with."""
    return "".join(
        f"| initial weights ({part}) | {model['model']}, SHA-256 `{model['sha256']}` |\n"
        for part, model in provenance.get("initial_weights", {}).items()
    )


def card_metrics(card: str) -> dict[str, float]:
    """The metrics in a model card, by name."""
    rows = re.findall(r"^\| (\w+) \| (-?[\d.]+) \|$", card, re.MULTILINE)
    return {name: float(value) for name, value in rows}


def _radiographs(geometry: Geometry) -> str:
    names = [view.name for view in geometry.views]
    return f"a {names[0]} radiograph" if len(names) == 1 else f"{len(names)} radiographs ({', '.join(names)})"


def _view(view: View) -> str:
    edge = f", the patient's {view.left_edge} at the left edge" if view.left_edge else ""
    return f"{view.name} ({view.pose}{edge})"


def _count(views: int) -> str:
    return "One view does" if views == 1 else f"{views} views do"


def _files(geometry: Geometry) -> str:
    return " ".join(f"--view {view.name}={view.name}.png" for view in geometry.views)
