"""Every system with the same small budget on the same archive, measured on the same held-out scans.

The slim presets train one after another for the same number of steps of the same batch, with the commands of the
README; a run that exists is resumed. The table compares systems after minutes on two cores, not after their published
schedules. CycleGANs get other patients' CT of the training split, a refiner refines the slim X2CT-GAN of the same
table. An archive of phantoms and CT together, with splits of the CT given by hand:

    raylift ingest scans/ --archive data/mixed --size 64 --spacing-mm 5 --splits splits.csv
    raylift phantom --archive data/mixed --count 40 --size 64 --spacing-mm 5
    python benchmarks/systems.py --archive data/mixed --steps 200 --output runs/systems
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from statistics import fmean

from raylift.models.systems.cyclegan import CycleGan
from raylift.models.zoo import parameters
from raylift.platform import cli, model_store
from raylift.platform.presets import PRESETS
from raylift.platform.training.checkpoint import RUN_FILE, resolve_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import header, table

COLUMNS = {"MAE, HU": "mae_hu", "PSNR, dB": "psnr_db", "SSIM": "ssim"}
BASE = "x2ct-gan-slim"
"""The base of refiners; it must come before them."""
MEAN, BACK = "mean volume", "back-projection"
SLIM = [name for name in PRESETS if name.endswith("-slim")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/systems"))
    parser.add_argument("--presets", nargs="+", default=SLIM)
    options = parser.parse_args()
    rows = []
    reports: dict[str, dict] = {}
    for name in options.presets:
        run, report = options.output / name, options.output / f"{name}-report"
        new = [name, "--data.archive", options.archive, "--output", str(run), "--train.steps", str(options.steps)]
        new += ["--train.batch-size", str(options.batch), "--train.validate-every", str(max(1, options.steps // 4))]
        new += required_options(name, options.archive, options.output)
        begun = ["--resume", str(run)] if (run / RUN_FILE).exists() else new
        evaluate = ["evaluate", str(run), "--archive", options.archive, "--output", str(report)]
        with contextlib.redirect_stdout(sys.stderr):
            for words in (["train", *begun], evaluate):
                if status := cli.main(words):
                    return status
        reports[name] = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
        count = parameters(model_store.load(resolve_checkpoint(str(run))).network.requires_grad_())
        rows.append([name, f"{count:,}", *values(reports[name], "model")])
    rows += trivial(options.presets, reports)
    first = reports[options.presets[0]]
    header("systems")
    groups = ", ".join(f"{len(cases)} {group}" for group, cases in grouped(first).items())
    trained = f"{options.steps} steps with batch size {options.batch}"
    title = f"{trained}; protocol `volume`, means over the test scans ({groups})"
    measured = [f"{name}, {group}" for group in grouped(first) for name in (*COLUMNS, "lung Dice")]
    table(title, ["preset", "parameters", *measured], rows)
    for group in grouped(first):
        below = [name for name, report in reports.items() if psnr(report, group, "model") <= psnr(report, group, MEAN)]
        print(f"* no better than the mean volume in PSNR ({group}): {', '.join(below) or 'none'}")
    print("* test scans: " + ", ".join(first["cases"]))
    for note in differences(options.presets):
        print(f"* {note}")
    return 0


def differences(presets: list[str]) -> list[str]:
    """Differences between the systems of the table, apart from their networks."""
    systems = {name: PRESETS[name].system for name in presets}
    alone = [name for name, system in systems.items() if system.supervision == "radiographs"]
    unpaired = [name for name in alone if isinstance(systems[name], CycleGan)]
    refiners = [name for name, system in systems.items() if system.base_models]
    notes = [
        f"supervised by DRRs alone, without the CT of the same subjects: {', '.join(alone)}" if alone else "",
        f"of these, with the train split's CT as unpaired volumes: {', '.join(unpaired)}" if unpaired else "",
        *(f"{name} refines {BASE} of this table: its steps are in addition to that one's" for name in refiners),
        "parameters are those of the whole network that predicts the volume, frozen parts included",
    ]
    return [note for note in notes if note]


def required_options(name: str, ct: str, runs: Path) -> list[str]:
    """Further options of a preset: CT of other patients for a CycleGAN, the run of a base for a refiner."""
    system = PRESETS[name].system
    unpaired = ["--data.unpaired", ct] if isinstance(system, CycleGan) else []
    return unpaired + (["--system.base-model", str(runs / BASE)] if system.base_models else [])


def trivial(presets: list[str], reports: dict[str, dict]) -> list[list[str]]:
    """Rows of the trivial baselines; back-projection depends on the number of views."""
    by_views = {len(PRESETS[name].system.views): reports[name] for name in presets}
    rows = [[MEAN, "", *values(reports[presets[0]], MEAN)]]
    for views, report in sorted(by_views.items()):
        rows.append([f"{BACK}, {views} view{'s'[: views - 1]}", "", *values(report, BACK)])
    return rows


def psnr(report: dict, group: str, predictor: str) -> float:
    """Mean PSNR of a predictor over a group of scans, in dB."""
    return fmean(case[predictor]["volume"]["psnr_db"] for case in grouped(report)[group])


def grouped(report: dict) -> dict[str, list[dict]]:
    """The cases by their source: real or synthetic."""
    groups: dict[str, list[dict]] = {"real": [], "synthetic": []}
    for name, case in report["cases"].items():
        groups["synthetic" if name.startswith("phantom") else "real"].append(case)
    return {group: cases for group, cases in groups.items() if cases}


def values(report: dict, predictor: str) -> list[str]:
    cells = []
    for cases in grouped(report).values():
        for key in COLUMNS.values():
            digits = {"mae_hu": 0, "psnr_db": 2}.get(key, 3)
            cells.append(f"{fmean(case[predictor]['volume'][key] for case in cases):.{digits}f}")
        cells.append(f"{fmean(case[predictor]['segmentation']['lung_dice'] for case in cases):.3f}")
    return cells


if __name__ == "__main__":
    raise SystemExit(main())
