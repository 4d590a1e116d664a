"""X-Recon (Wang et al. 2024, arXiv 2407.15356): X2CT-GAN's twins, an intensity at every size, projections in cones.

Encoders, lifting and view decoders are X2CT-GAN's with lighter dense blocks of 4, 8, 16, 8 and 4 layers. Multi-scale
fusion rendering takes the head's place: at each size a 1 x 1 x 1 convolution on the views' average and what has grown
gives intensities, which are combined from coarse to fine. The discriminator's first layer sees coordinates. The loss
is 10 times squared error, 0.1 times L1 of three cone-beam projections, whose poses are turned by N(0, 10 degrees) and
moved by N(0, 8 voxels) at every step, and LSGAN with weight 1 for both players. Adam at 5e-5, betas 0.5 and 0.99, batch
1, 100 epochs constant and 100 falling, 224 voxels a side at 1.6 mm. The generator has 98,799,735 parameters at 224 and
37,517,943 at 128, the discriminator 11,067,457; the fused decoder's last size, which nothing reads, is among them and
is not computed.

Ours: projections come from raylift's projector with the published source, detector and step; their projector samples
a volume of 224 voxels as if it had 128, here a volume of any size fills their 128 units. Size and origin of the
training set are not clear from the paper and the code, so the preset's steps are 200 epochs of the 916 volumes that
X2CT-GAN trains on.
"""

from __future__ import annotations

from raylift.models.composition import Composition
from raylift.models.objectives.adversarial import ReconstructionLoss
from raylift.models.parts.decoders import DecoderConfig
from raylift.models.parts.discriminators import DiscriminatorConfig
from raylift.models.parts.encoders import EncoderConfig


def x_recon(views: tuple[str, ...] = ("frontal", "lateral")) -> Composition:
    """Multi-scale fusion rendering; activation checkpointing lets 224^3 fit one GPU."""
    return Composition(
        name="x-recon",
        views=views,
        encoder=EncoderConfig(layers=(4, 8, 16, 8, 4)),
        decoder=DecoderConfig(head="rendering", output="leaky_relu"),
        discriminator=DiscriminatorConfig(kind="coordinate"),
        loss=ReconstructionLoss(adversarial=1.0, projection=0.0, cone_projection=0.1),
        checkpointing="all",
    )
