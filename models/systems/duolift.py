"""DuoLift-GAN and DuoLift-CNN (Zhang and Ying 2024, arXiv 2411.07941): features and image lifted side by side.

Two branches: encoded features duplicated along the depth, and the radiograph itself duplicated and taken through a 3-D
ResNet. Together they are one feature volume, which a U-Net++ with deep supervision decodes. A masked loss compares
the volumes inside the lungs; a 3-D CNN judges them. From one view or two. DuoLift-CNN has no discriminator.

The paper gives no sizes. Chosen here: a dense encoder as X2CT-GAN's with the four stages that a U-Net++ of five sizes
wants, no fully connected layer (nothing in the paper makes a vector); widths of 16 to 256; a residual block a size for
the image; branches merged by a 1 x 1 x 1 convolution, views by concatenation (the decoder may weigh them); lifted
features enter the U-Net++ at the size they have. Squared errors of equal weight over the whole and in the lungs,
0.5 for the mean over the three auxiliary volumes, so that the reconstruction counts most; no projection term (none is
named); an adversarial weight of 0.1 (X2CT-GAN's); a discriminator of X2CT-GAN's widths with one score for the volume
alone, which is how it is described; a leaky output, whose ReLU cannot die. Masks are the archive's labels.
"""

from __future__ import annotations

from dataclasses import replace

from raylift.models.composition import Composition
from raylift.models.objectives.adversarial import ReconstructionLoss
from raylift.models.parts.decoders import DecoderConfig
from raylift.models.parts.discriminators import DiscriminatorConfig
from raylift.models.parts.encoders import EncoderConfig
from raylift.models.parts.fusion import FusionConfig
from raylift.models.parts.lifting import LiftingConfig


def duolift_gan(views: tuple[str, ...] = ("frontal", "lateral")) -> Composition:
    """Dual lifting into a U-Net++."""
    return Composition(
        name="duolift-gan",
        views=views,
        encoder=EncoderConfig(layers=(6, 12, 24, 16)),
        lifting=LiftingConfig(kind="duo", coarsest="features"),
        fusion=FusionConfig(kind="concatenate", feedback=False),
        decoder=DecoderConfig(kind="unet++", channels=(256, 128, 64, 32, 16), head_kernel=1, output="leaky_relu"),
        discriminator=DiscriminatorConfig(kind="cnn", conditional=False),
        loss=ReconstructionLoss(projection=0.0, lung=10.0, deep_supervision=0.5),
    )


def duolift_cnn(views: tuple[str, ...] = ("frontal", "lateral")) -> Composition:
    """The same without the adversarial term."""
    gan = duolift_gan(views)
    return replace(gan, name="duolift-cnn", loss=replace(gan.loss, adversarial=0.0))
