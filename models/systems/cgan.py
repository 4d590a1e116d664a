"""cGAN-128 (Adwait et al. 2024, Boston University EC 523): a conditional GAN whose answer is a volume.

Theirs, and kept: a 2-D U-Net of 64 to 1,024 channels, a 2-D patch discriminator of 64, 128 and 256 channels with the
radiographs as condition, cross-entropy plus the squared errors of both views with equal weights, Adam at 1e-4, batch 4.

Corrected here:

* their answer is one image, stacked 64 times. Here the U-Net's last map has a channel for every depth along the view's
  rays and stands up as a volume (as PSR's does), and a small residual 3-D U-Net makes one volume of the views';
* their lateral view is the frontal one under another name, because the name they replace does not occur. Here it
  is the lateral, and both views go through the same U-Net, each along its own rays;
* their discriminator sees an image beside the one it was made from. Here that pair would be told apart by subtracting,
  so it judges both views of a person together, one of them re-projected and the other as given: a re-projected
  lateral must be this frontal's.

Squared errors are those of standardized re-projections, with the scale from the thickness of an adult, as in
u-X2CTGAN. Not given, and chosen: widths of 32, 16 and 8 in 3-D, a sigmoid at the end. Theirs was trained for one epoch;
the preset trains for 40, as their CycleGAN.
"""

from __future__ import annotations

from raylift.models.objectives.reprojection import ReprojectionLoss
from raylift.models.parts.decoders import DecoderConfig
from raylift.models.parts.discriminators import ViewDiscriminatorConfig
from raylift.models.parts.encoders import EncoderConfig
from raylift.models.parts.fusion import FusionConfig
from raylift.models.parts.lifting import LiftingConfig
from raylift.models.xray_only import Reprojected


def cgan_128(views: tuple[str, ...] = ("frontal", "lateral")) -> Reprojected:
    """A U-Net a view, a conditional discriminator, constant weights."""
    return Reprojected(
        name="cgan-128",
        views=views,
        encoder=EncoderConfig(kind="unet", stem=64, layers=(2, 2, 2, 2)),
        lifting=LiftingConfig(kind="channels", along="rays"),
        fusion=FusionConfig(kind="concatenate", feedback=False),
        decoder=DecoderConfig(kind="unet", channels=(32, 16, 8), head_kernel=3, output="sigmoid"),
        discriminator=ViewDiscriminatorConfig(pooled=False, conditional=True),
        # Two views' errors, each with weight 1, are twice their mean.
        loss=ReprojectionLoss(projection=2.0, total_variation=0.0, balanced=False),
    )
