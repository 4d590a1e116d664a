"""3DCNN (Kasten et al. 2020, arXiv 2004.00871): repeated radiographs through a residual 3-D encoder-decoder.

Each view is repeated along its rays and becomes a channel of a volume; a V-Net-like network with 3 x 3 x 3
convolutions, max pooling and concatenated skips does the rest. The paper segments knee bones; as a baseline of
reconstruction it regresses intensities, which is what it does here.

Not published, and chosen here: widths of 8 to 128 over four poolings and one residual unit of two convolutions a size
(those of the xrayto3D benchmark's version); instance norm in place of its batch norm, because batches of four
volumes on several workers give poor statistics; a linear output, because intensities are regressed; learning rate and
schedule (X2CT-GAN's). The paper's loss is a weighted cross-entropy and the correlation of gradients between projections
and radiographs; for intensities it is mean squared error and, for the projections, X2CT-GAN's term.
"""

from __future__ import annotations

from raylift.models.composition import Composition
from raylift.models.objectives.adversarial import ReconstructionLoss
from raylift.models.parts.decoders import DecoderConfig
from raylift.models.parts.encoders import EncoderConfig
from raylift.models.parts.fusion import FusionConfig
from raylift.models.parts.lifting import LiftingConfig


def cnn3d(views: tuple[str, ...] = ("frontal", "lateral")) -> Composition:
    """Nothing learned before 3-D."""
    return Composition(
        name="3dcnn",
        views=views,
        encoder=EncoderConfig(kind="image"),
        lifting=LiftingConfig(kind="plain"),
        fusion=FusionConfig(kind="concatenate", feedback=False),
        decoder=DecoderConfig(kind="unet", channels=(128, 64, 32, 16, 8), blocks=1, head_kernel=1, output="linear"),
        loss=ReconstructionLoss(adversarial=0.0),
    )
