"""The systems of the literature, and those of them that this version can build."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from raylift.models.systems.x2ct_gan import X2CTGAN

System = X2CTGAN
"""The configuration of any system; a union once there are several."""

SYSTEMS: dict[str, type[System]] = {"x2ct-gan": X2CTGAN}


@dataclass(frozen=True)
class Published:
    """A system as the literature has it."""

    title: str
    paper: str
    views: str
    kind: str
    name: str = ""
    """Its name here, empty where this version does not have it."""


LITERATURE = (
    Published("X2CT-GAN", "Ying et al. 2019, arXiv 1905.06902", "1 or 2", "GAN", "x2ct-gan"),
    Published("X2CT-CNN", "Ying et al. 2019, arXiv 1905.06902", "1 or 2", "regression", "x2ct-gan"),
    Published("PSR", "Henzler et al. 2018, arXiv 1710.04867", "1", "regression"),
    Published("3DCNN", "Kasten et al. 2020, arXiv 2004.00871", "2", "regression"),
    Published("CVAA-GAN", "arXiv 2408.09736", "2", "GAN"),
    Published("DuoLift-GAN, DuoLift-CNN", "Zhang and Ying 2024, arXiv 2411.07941", "1 or 2", "GAN, regression"),
    Published("X-Recon", "arXiv 2407.15356", "2", "GAN"),
    Published("TRCT-GAN", "Wang et al. 2023, DSP 140:104123", "2", "GAN"),
    Published("DiffuX2CT", "arXiv 2407.13545", "2", "diffusion"),
    Published("u-X2CTGAN", "unsupervised GANs for 2-D to 3-D", "2", "from X-rays alone"),
    Published("CycleGAN-B, CycleGAN-F", "unsupervised GANs for 2-D to 3-D", "2, 1", "from X-rays alone"),
    Published("cGAN-128", "unsupervised GANs for 2-D to 3-D", "2", "from X-rays alone"),
    Published("diffusion refiner", "unsupervised GANs for 2-D to 3-D", "any", "diffusion"),
)


def parameters(network: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
