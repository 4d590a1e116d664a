"""All systems by name, one per line."""

from __future__ import annotations

from torch import nn

from raylift.datasets.errors import ConfigError
from raylift.datasets.serialization import register_union
from raylift.models.composition import Composition
from raylift.models.system_config import SystemConfig
from raylift.models.system_entry import SystemEntry
from raylift.models.systems.cgan import CGAN_128
from raylift.models.systems.cnn3d import CNN3D
from raylift.models.systems.cvaa import CVAA_GAN
from raylift.models.systems.cyclegan import CYCLEGAN_B, CYCLEGAN_F
from raylift.models.systems.diffux2ct import DIFFUX2CT
from raylift.models.systems.duolift import DUOLIFT_CNN, DUOLIFT_GAN
from raylift.models.systems.latent_diffusion import LATENT_DIFFUSION
from raylift.models.systems.psr import PSR
from raylift.models.systems.refiner import REFINER
from raylift.models.systems.trct import TRCT_GAN
from raylift.models.systems.u_x2ct import U_X2CTGAN
from raylift.models.systems.unrolled import UNROLLED
from raylift.models.systems.x2ct import X2CT_CNN, X2CT_GAN
from raylift.models.systems.x_recon import X_RECON

SYSTEMS: dict[str, SystemEntry] = {
    "psr": PSR,
    "3dcnn": CNN3D,
    "x2ct-gan": X2CT_GAN,
    "x2ct-cnn": X2CT_CNN,
    "cvaa-gan": CVAA_GAN,
    "duolift-gan": DUOLIFT_GAN,
    "duolift-cnn": DUOLIFT_CNN,
    "x-recon": X_RECON,
    "trct-gan": TRCT_GAN,
    "diffux2ct": DIFFUX2CT,
    "latent-diffusion": LATENT_DIFFUSION,
    "u-x2ctgan": U_X2CTGAN,
    "cyclegan-b": CYCLEGAN_B,
    "cyclegan-f": CYCLEGAN_F,
    "cgan-128": CGAN_128,
    "refiner": REFINER,
    "unrolled": UNROLLED,
}

register_union(
    SystemConfig,
    tag="name",
    kinds={name: type(entry.full) for name, entry in SYSTEMS.items()},
    otherwise=Composition,
)


def check_name(system: SystemConfig) -> None:
    """Check that settings have a name of `SYSTEMS` whose system has such settings.

    Raises:
        ConfigError: they do not.
    """
    names = [name for name, entry in SYSTEMS.items() if type(entry.full) is type(system)]
    if system.name not in names:
        raise ConfigError(f"system.name is '{system.name}': with these settings it must be one of {', '.join(names)}")


def parameters(network: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
