"""The commands that run a model: `raylift reconstruct` and `raylift serve`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from jaxtyping import Float32

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import View
from raylift.datasets.radiographs.decoding import Inversion
from raylift.datasets.radiographs.orientation import PatientFacingOption, expected_patient_facing
from raylift.datasets.radiographs.preparation import load_radiograph
from raylift.models.generative import SamplingFlags
from raylift.serve.settings import ServeSettings


@dataclass(frozen=True)
class ReconstructOptions:
    """Reconstruct a CT volume in HU from radiographs and write it as NIfTI."""

    model: tyro.conf.Positional[str]
    """Exported folder or checkpoint."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Output file, .nii.gz."""
    frontal: Path | None = None
    """Frontal radiograph (DICOM, PNG, JPEG, TIFF, BMP), the patient's right at the left edge."""
    lateral: Path | None = None
    """Lateral radiograph; see --patient-facing."""
    invert: Inversion = "auto"
    """Whether to invert the images; auto inverts those in which bone is dark."""
    flip_frontal: bool = False
    """Mirror the frontal image left to right."""
    patient_facing: PatientFacingOption = "auto"
    """The edge that the patient faces in the lateral image; auto detects it. The image is mirrored if the model's DRRs
    face the other edge."""
    consistency_steps: int = 0
    """Steps of the data-consistency fit after the network; 0 for none."""
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = field(default_factory=SamplingFlags)
    samples: int = 1
    """Number of samples of a generative model; writes their mean, and their standard deviation in HU as
    OUTPUT-std.nii.gz."""
    threads: int = 0
    """PyTorch threads; 0 for PyTorch's default."""


def reconstruct(arguments: list[str]) -> int:
    """Run `raylift reconstruct`."""
    import torch

    from raylift.platform import model_store
    from raylift.serve.reconstructor import Reconstructor, format_residuals, nifti

    options = tyro.cli(ReconstructOptions, prog="raylift reconstruct", args=arguments)
    if not options.output.name.endswith(".nii.gz"):
        raise ConfigError(f"{options.output}: volumes are written as .nii.gz")
    if options.threads:
        torch.set_num_threads(options.threads)
    model = model_store.load(options.model)
    options.sampling.resolve(model.network, options.samples)
    reconstructor = Reconstructor(model, consistency_steps=options.consistency_steps, sampling=options.sampling)
    paths = {"frontal": options.frontal, "lateral": options.lateral}
    try:
        poses = {pose.name: pose for pose in reconstructor.description.geometry.views}
        images = {
            name: _load(
                path,
                poses.get(name, View(name)),
                options.invert,
                flip=options.flip_frontal and name == "frontal",
                patient_facing=options.patient_facing,
            )
            for name, path in paths.items()
            if path is not None
        }
        (result,) = reconstructor.reconstruct([reconstructor.prepare(images)], [options.samples])
        grid, note = reconstructor.description.grid, f"raylift {reconstructor.sha256[:12]}, research only"
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_bytes(nifti(result.hu, grid, note))
        if result.std is not None:
            std_path = options.output.with_name(options.output.name.removesuffix(".nii.gz") + "-std.nii.gz")
            std_path.write_bytes(nifti(result.std, grid, note))
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


def _load(
    path: Path, pose: View, invert: Inversion, flip: bool, patient_facing: PatientFacingOption
) -> Float32[np.ndarray, "_ _"]:
    """The image in the orientation of the model's DRRs; prints whether it was mirrored or is ambiguous."""
    loaded = load_radiograph(path, pose, invert=invert, flip=flip, patient_facing=patient_facing)
    if not loaded.is_clear:
        print(
            f"{pose.name}: cannot detect which edge the patient faces; assuming {expected_patient_facing(pose)}: "
            "pass --patient-facing"
        )
    elif loaded.detected and loaded.mirrored:
        print(
            f"{pose.name}: the patient faces {loaded.patient_facing}; the image is mirrored: "
            "pass --patient-facing to override"
        )
    return loaded.image


def serve(arguments: list[str]) -> int:
    """Run `raylift serve`."""
    from raylift.datasets.archive.store import absolute
    from raylift.platform import cluster
    from raylift.serve import deployment

    settings = tyro.cli(ServeSettings, prog="raylift serve", args=arguments)
    cluster.connect()
    interrupted = deployment.interruption()
    url = deployment.start(settings)
    print(f"serving {absolute(settings.model)} on {url} (page /, API /docs); stop with Ctrl-C", flush=True)
    deployment.wait(interrupted)
    return 0
