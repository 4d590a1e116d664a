"""PSR, single-image tomography (Henzler et al. 2018, arXiv 1710.04867): a 2-D network whose channels are depths.

The network is X2CT's re-implementation of it, their baseline "2DCNN", as far as its description goes: a residual
encoder-decoder with batch norm on a radiograph of twice the volume's size, four poolings, sums as skips, depthwise
steps up, and two 1 x 1 convolutions to a channel for every depth. 9,068,480 parameters for 256 -> 128.

Not published, and chosen here: the paper's own layers and losses (the re-implementation's mean squared error alone
is taken, with its weight decay of 1e-4); the learning rate (X2CT-GAN's); where biases stand (so that the count is the
published one). Ours: a radiograph of the volume's size is brought to twice its size inside; the paper's second step,
which fuses the volume with the radiograph at a higher resolution, is left out as in the re-implementation.
"""

from __future__ import annotations

from raylift.models.composition import Composition
from raylift.models.objectives.adversarial import ReconstructionLoss
from raylift.models.parts.decoders import DecoderConfig
from raylift.models.parts.encoders import EncoderConfig
from raylift.models.parts.fusion import FusionConfig
from raylift.models.parts.lifting import LiftingConfig


def psr(views: tuple[str, ...] = ("frontal",)) -> Composition:
    """Channels as depth; with several views their volumes are averaged, which the paper does not do."""
    return Composition(
        name="psr",
        views=views,
        encoder=EncoderConfig(kind="hourglass", stem=64, layers=(3, 3, 3, 5)),
        lifting=LiftingConfig(kind="channels"),
        fusion=FusionConfig(feedback=False),
        decoder=DecoderConfig(kind="none", channels=(1,), output="linear"),
        loss=ReconstructionLoss(adversarial=0.0, voxel=1.0, projection=0.0),
    )
