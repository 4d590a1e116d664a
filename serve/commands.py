"""The commands that run a model: `raylift reconstruct` and `raylift serve`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from raylift.datasets.archive.store import local_path
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import View
from raylift.datasets.radiographs import input_checks
from raylift.datasets.radiographs.decoding import Inversion
from raylift.datasets.radiographs.orientation import OrientedRadiograph, PatientFacingOption, expected_patient_facing
from raylift.datasets.radiographs.preparation import load_radiograph
from raylift.models.diffusion.diffusion_network import SamplingFlags
from raylift.platform import model_store
from raylift.serve.settings import ServeSettings


@dataclass(frozen=True)
class ReconstructOptions:
    """Reconstruct a CT volume in HU from radiographs and write it to a file."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Output file: .nii.gz, .nrrd, .zip (a DICOM series) or .png (the middle slices)."""
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[MODEL]")] = ""
    """models:NAME (see `raylift models`), or the path or URL of an exported folder or checkpoint. Without one,
    models:chest-64, or models:chest-64-frontal for a frontal radiograph alone."""
    view: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=FILE")] = ()
    """A radiograph (DICOM, PNG, JPEG, TIFF, BMP) of the view of that name; once for each of the model's views."""
    frontal: Path | None = None
    """The same as --view frontal=FILE: the patient's right at the left edge."""
    lateral: Path | None = None
    """The same as --view lateral=FILE; see --patient-facing."""
    invert: Inversion = "auto"
    """Whether to invert the images; auto inverts those in which bone is dark."""
    flip_frontal: bool = False
    """Flip the frontal image left to right."""
    patient_facing: PatientFacingOption = "auto"
    """The edge that the patient faces in images of lateral views (azimuth 90 or 270 degrees); auto detects it. An image
    is flipped if the model's DRRs face the other edge. Other views are taken as given."""
    strict: bool = False
    """Refuse radiographs with a warning of the checks of the input, such as exchanged views; otherwise warnings are
    printed."""
    consistency_steps: int = 0
    """Steps of the data-consistency fit after the network; 0 for none."""
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = field(default_factory=SamplingFlags)
    samples: int = 1
    """Number of samples of a diffusion model; writes their mean and, next to it, their standard
    deviation in HU as NAME-std.nii.gz or NAME-std.nrrd."""
    threads: int = 0
    """PyTorch threads; 0 for PyTorch's default."""


def reconstruct(arguments: list[str]) -> int:
    """Run `raylift reconstruct`."""
    import torch

    from raylift.serve.reconstructor import Reconstructor, format_residuals
    from raylift.serve.served_model import ReconstructionSettings
    from raylift.serve.volume_formats import FORMATS

    options = tyro.cli(ReconstructOptions, prog="raylift reconstruct", args=arguments)
    name = local_path(options.output).name
    kind = next((kind for kind in FORMATS.values() if name.endswith(kind.suffix)), None)
    if kind is None:
        written = ", ".join(f"{kind.suffix} ({kind.summary})" for kind in FORMATS.values())
        raise ConfigError(f"{options.output}: volumes are written as {written}")
    if options.samples > 1 and not kind.has_std:
        raise ConfigError(f"{options.output}: with --samples write .nii.gz or .nrrd, which have the standard deviation")
    if options.threads:
        torch.set_num_threads(options.threads)
    paths = _files_by_view(options)
    name = options.model or _default_model(paths)
    model = model_store.load(name)
    options.sampling.resolve(model.network, options.samples)
    reconstructor = Reconstructor(model, consistency_steps=options.consistency_steps, sampling=options.sampling)
    if name == model_store.DEFAULT_MODEL and set(paths) < set(reconstructor.views):
        flags = " and ".join(f"--{view}" for view in reconstructor.views)
        raise ConfigError(f"{name} needs {flags}: pass both, or use {model_store.FRONTAL_MODEL} with --frontal")
    reconstructor.require_views(list(paths))
    try:
        views = {view.name: view for view in reconstructor.description.geometry.views}
        radiographs = {
            name: _load(
                path,
                views[name],
                options.invert,
                flip=options.flip_frontal and name == "frontal",
                patient_facing=options.patient_facing,
            )
            for name, path in paths.items()
        }
        prepared = reconstructor.prepare({name: radiograph.image for name, radiograph in radiographs.items()})
        checks = input_checks.check(radiographs, prepared)
        if options.strict:
            input_checks.require_ok(checks)
        for sentence in input_checks.sentences(checks):
            print(sentence, file=sys.stderr, flush=True)
        (result,) = reconstructor.reconstruct([prepared], [ReconstructionSettings(options.samples)])
        grid, note = reconstructor.description.grid, f"raylift {reconstructor.sha256[:12]}, research only"
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_bytes(kind.encode(result.hu, grid, note))
        if result.std is not None:
            std_path = options.output.with_name(f"{options.output.name.removesuffix(kind.suffix)}-std{kind.suffix}")
            std_path.write_bytes(kind.encode(result.std, grid, note))
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error
    print(
        f"{options.output}: {grid.size}^3 voxels of {grid.spacing_mm:g} mm, {result.hu.min()} to {result.hu.max()} HU"
    )
    if result.std is not None:
        print(f"{std_path}: standard deviation over {options.samples} samples, {result.std.mean():.0f} HU on average")
    if result.residuals:
        print(f"reprojection residual before and after the data-consistency fit: {format_residuals(result.residuals)}")
    print("Research software, not a medical device: not for diagnosis.")
    return 0


def _default_model(views: Iterable[str]) -> str:
    """The pretrained model for these views."""
    return model_store.FRONTAL_MODEL if set(views) == {"frontal"} else model_store.DEFAULT_MODEL


def _files_by_view(options: ReconstructOptions) -> dict[str, Path]:
    """The files of --view, --frontal and --lateral by the name of their view."""
    given = {"frontal": options.frontal, "lateral": options.lateral}
    pairs = [(view, path) for view, path in given.items() if path is not None]
    for text in options.view:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--view {text[:80]}: write the name of a view and its file, as in --view frontal=pa.png")
        pairs.append((name, Path(path)))
    files = dict(pairs)
    if len(files) < len(pairs):
        raise ConfigError(f"a view was given two files: {', '.join(name for name, _ in pairs)}")
    return files


def _load(
    path: Path, view: View, invert: Inversion, flip: bool, patient_facing: PatientFacingOption
) -> OrientedRadiograph:
    """The radiograph in the orientation of the model's DRRs; prints whether it was flipped or is ambiguous."""
    loaded = load_radiograph(path, view, invert=invert, flip=flip, patient_facing=patient_facing)
    if loaded.notes:
        print(f"{view.name}: {'; '.join(loaded.notes)}")
    if not loaded.is_clear:
        print(
            f"{view.name}: cannot detect which edge the patient faces; assuming {expected_patient_facing(view)}: "
            "pass --patient-facing"
        )
    elif loaded.detected and loaded.flipped:
        print(
            f"{view.name}: the patient faces {loaded.patient_facing}; the image is flipped: "
            "pass --patient-facing to override"
        )
    return loaded


def serve(arguments: list[str]) -> int:
    """Run `raylift serve`."""
    from raylift.platform import cluster
    from raylift.serve import deployment

    settings = tyro.cli(ServeSettings, prog="raylift serve", args=arguments)
    deployment.require_free(settings.host, settings.port)
    cluster.connect()
    deployed = deployment.applications(settings)
    interrupted = deployment.interruption()
    url = deployment.start(settings, deployed, interrupted)
    if not interrupted.is_set():
        print(
            f"serving {model_store.resolve(settings.model)} on {url} (page /, API /docs); stop with Ctrl-C", flush=True
        )
        for path, own in list(settings.by_path.items())[1:]:
            print(f"serving {model_store.resolve(own.model)} on {url}{path}/ (API {path}/docs)", flush=True)
    deployment.wait(interrupted, settings.grace_s)
    return 0
