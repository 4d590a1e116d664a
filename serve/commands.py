"""The verbs that use a model: `raylift reconstruct` and `raylift serve`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from jaxtyping import Float32

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import View
from raylift.datasets.radiographs.decoding import Inversion, read_file
from raylift.datasets.radiographs.orientation import AskedFacing, hang, projected
from raylift.models.generative import SamplingFlags
from raylift.serve.settings import ServeSettings


@dataclass(frozen=True)
class ReconstructOptions:
    """Make a CT volume in HU from radiographs and write it as NIfTI."""

    model: tyro.conf.Positional[str]
    """An exported folder or a checkpoint."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The file to write: .nii.gz."""
    frontal: Path | None = None
    """Frontal radiograph (DICOM, PNG, JPEG, TIFF), the patient's right at its left."""
    lateral: Path | None = None
    """Lateral radiograph; --facing says where the patient faces."""
    invert: Inversion = "auto"
    """Whether to invert images that show bone dark."""
    flip_frontal: bool = False
    """Mirror the frontal image."""
    facing: AskedFacing = "auto"
    """Where the patient of the lateral image faces; auto mirrors it where the image clearly shows the other edge."""
    consistency_steps: int = 0
    """Steps that fit the volume to the radiographs after the network; 0 leaves it as the network made it."""
    draw: Annotated[SamplingFlags, tyro.conf.arg(name="")] = field(default_factory=SamplingFlags)
    samples: int = 1
    """Of a model that draws its volume: write the mean of so many draws, and beside it their standard deviation in HU,
    OUT-std.nii.gz."""
    threads: int = 0
    """PyTorch threads; 0 leaves the choice to it."""


def reconstruct(arguments: list[str]) -> int:
    """Radiographs to a CT volume as NIfTI."""
    import torch

    from raylift.models import weights
    from raylift.serve.reconstructor import Reconstructor, nifti, told

    options = tyro.cli(ReconstructOptions, prog="raylift reconstruct", args=arguments)
    if not options.output.name.endswith(".nii.gz"):
        raise ConfigError(f"{options.output}: volumes are written as .nii.gz")
    if options.threads:
        torch.set_num_threads(options.threads)
    model = weights.load(options.model)
    options.draw.resolve(model.network, options.samples)
    reconstructor = Reconstructor(model, consistency_steps=options.consistency_steps, draw=options.draw)
    given = {"frontal": options.frontal, "lateral": options.lateral}
    try:
        images = {
            view: read_file(path, view=view, invert=options.invert) for view, path in given.items() if path is not None
        }
        if "frontal" in images and options.flip_frontal:
            images["frontal"] = np.ascontiguousarray(images["frontal"][:, ::-1])
        for pose in reconstructor.description.geometry.views:
            if pose.name in images:
                images[pose.name] = _hung(images[pose.name], pose, options.facing)
        (made,) = reconstructor.reconstruct([reconstructor.prepare(images)], [options.samples])
        grid, note = reconstructor.description.grid, f"raylift {reconstructor.sha256[:12]}, research only"
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_bytes(nifti(made.hu, grid, note))
        if made.deviation is not None:
            beside = options.output.with_name(options.output.name.removesuffix(".nii.gz") + "-std.nii.gz")
            beside.write_bytes(nifti(made.deviation, grid, note))
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error
    print(f"{options.output}: {grid.size}^3 voxels of {grid.spacing_mm:g} mm, {made.hu.min()} to {made.hu.max()} HU")
    if made.deviation is not None:
        print(f"{beside}: standard deviation over {options.samples} draws, {made.deviation.mean():.0f} HU on average")
    if made.residuals:
        print(f"projection residual before and after the fit: {told(made.residuals)}")
    print("Research software, not a medical device: not for diagnosis.")
    return 0


def _hung(image: Float32[np.ndarray, "_ _"], pose: View, facing: AskedFacing) -> Float32[np.ndarray, "_ _"]:
    """The image as the pose projects it, with a line for a person where that was a judgment."""
    hung = hang(image, pose, facing)
    if hung is None:
        print(f"{pose.name}: it is not clear where the patient faces, {projected(pose)} is assumed: pass --facing")
        return image
    if hung.detected and hung.mirrored:
        print(f"{pose.name}: the patient faces {hung.facing} and is mirrored; --facing says otherwise")
    return hung.image


def serve(arguments: list[str]) -> int:
    """HTTP API and web page for a model."""
    from raylift.datasets.archive.store import absolute
    from raylift.platform import cluster
    from raylift.serve import deployment

    settings = tyro.cli(ServeSettings, prog="raylift serve", args=arguments)
    cluster.connect()
    ended = deployment.interruption()
    url = deployment.start(settings)
    print(f"serving {absolute(settings.model)} on {url} (page /, API /docs); Ctrl-C ends it", flush=True)
    deployment.wait(ended)
    return 0
