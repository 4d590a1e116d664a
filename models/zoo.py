"""The systems of the literature, by the names they have here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from raylift.datasets.serialization import register_union
from raylift.models.composition import Composition
from raylift.models.parts.cyclegan_networks import CycleGan
from raylift.models.system_config import SystemConfig
from raylift.models.systems.cgan import cgan_128
from raylift.models.systems.cnn3d import cnn3d
from raylift.models.systems.cvaa import cvaa_gan
from raylift.models.systems.cyclegan import cyclegan_b, cyclegan_f
from raylift.models.systems.diffux2ct import DiffuX2CT
from raylift.models.systems.duolift import duolift_cnn, duolift_gan
from raylift.models.systems.latent_diffusion import LatentDiffusion
from raylift.models.systems.psr import psr
from raylift.models.systems.refiner import Refiner
from raylift.models.systems.trct import trct_gan
from raylift.models.systems.u_x2ct import u_x2ctgan
from raylift.models.systems.x2ct import x2ct_cnn, x2ct_gan
from raylift.models.systems.x_recon import x_recon
from raylift.models.xray_only import Reprojected

System = Composition | Reprojected | CycleGan | DiffuX2CT | LatentDiffusion | Refiner
"""The settings of any system: a union of its families, told apart by their names."""

register_union(System, tag="name", otherwise=Composition, base=SystemConfig)

SYSTEMS: dict[str, Callable[[], System]] = {
    "psr": psr,
    "3dcnn": cnn3d,
    "x2ct-gan": x2ct_gan,
    "x2ct-cnn": x2ct_cnn,
    "cvaa-gan": cvaa_gan,
    "duolift-gan": duolift_gan,
    "duolift-cnn": duolift_cnn,
    "x-recon": x_recon,
    "trct-gan": trct_gan,
    "u-x2ctgan": u_x2ctgan,
    "cyclegan-b": cyclegan_b,
    "cyclegan-f": cyclegan_f,
    "cgan-128": cgan_128,
    "diffux2ct": DiffuX2CT,
    "latent-diffusion": LatentDiffusion,
    "refiner": Refiner,
}
"""The systems at their published settings."""


@dataclass(frozen=True)
class Published:
    """A system as the literature has it."""

    title: str
    paper: str
    views: str
    kind: str
    name: str
    """Its name here."""
    size: int = 128
    """Voxels a side, of its published settings."""
    spacing_mm: float = 2.5


UNSUPERVISED = "Adwait et al. 2024, Boston University"

LITERATURE = (
    Published("PSR", "Henzler et al. 2018, arXiv 1710.04867", "1", "regression", "psr"),
    Published("3DCNN", "Kasten et al. 2020, arXiv 2004.00871", "2", "regression", "3dcnn"),
    Published("X2CT-GAN", "Ying et al. 2019, arXiv 1905.06902", "1 or 2", "GAN", "x2ct-gan"),
    Published("X2CT-CNN", "Ying et al. 2019, arXiv 1905.06902", "1 or 2", "regression", "x2ct-cnn"),
    Published("CVAA-GAN", "Qiao et al. 2024, arXiv 2408.09736", "2", "GAN", "cvaa-gan", spacing_mm=2.0),
    Published("DuoLift-GAN", "Zhang and Ying 2024, arXiv 2411.07941", "1 or 2", "GAN", "duolift-gan"),
    Published("DuoLift-CNN", "Zhang and Ying 2024, arXiv 2411.07941", "1 or 2", "regression", "duolift-cnn"),
    Published("X-Recon", "Wang et al. 2024, arXiv 2407.15356", "2", "GAN", "x-recon", size=224, spacing_mm=1.6),
    Published("TRCT-GAN", "Wang et al. 2023, DSP 140:104123", "2", "GAN", "trct-gan"),
    Published("DiffuX2CT", "Liu et al. 2024, arXiv 2407.13545", "2", "diffusion", "diffux2ct"),
    Published("latent DiffuX2CT", "none: DiffuX2CT's condition on latents", "2", "diffusion", "latent-diffusion"),
    Published("u-X2CTGAN", UNSUPERVISED, "2", "from X-rays alone", "u-x2ctgan"),
    Published("CycleGAN-B", UNSUPERVISED, "2", "from X-rays alone", "cyclegan-b", size=64, spacing_mm=5.0),
    Published("CycleGAN-F", UNSUPERVISED, "1", "from X-rays alone", "cyclegan-f", size=64, spacing_mm=5.0),
    Published("cGAN-128", UNSUPERVISED, "2", "from X-rays alone", "cgan-128"),
    Published("diffusion refiner", UNSUPERVISED, "any", "diffusion", "refiner"),
)


def parameters(network: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
