"""DuoLift-GAN and DuoLift-CNN (Zhang and Ying 2024, arXiv 2411.07941): features and image lifted side by side.

```
features   -> repeated along the depth, convolved -+
                                                   +-> 1^3 convolution -> U-Net++ with deep supervision -> volume
radiograph -> repeated, 3-D ResNet ----------------+
```

A masked loss compares the volumes inside the lungs; a 3-D CNN is the discriminator. From one view or two. DuoLift-CNN
has no discriminator.

The paper gives no sizes. Chosen here: a dense encoder as X2CT-GAN's with the four stages that a U-Net++ of five sizes
needs, no fully connected layer (nothing in the paper makes a vector); widths of 16 to 256; a residual block per size
for the image; branches merged by a 1 x 1 x 1 convolution, views by concatenation (the decoder may weight them); lifted
features enter the U-Net++ at the size they have. Squared errors of equal weight over the whole and in the lungs, 0.5
for the mean over the three auxiliary volumes, so that the reconstruction counts most; no projection term (none is
named); an adversarial weight of 0.1 (X2CT-GAN's); a discriminator of X2CT-GAN's widths with one score for the volume
alone, as it is described; a leaky ReLU as output, whose gradient does not vanish. Masks are the archive's labels.
Activation checkpointing is not published either.
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
from raylift.models.slimming import slim, tiny
from raylift.models.system_entry import SystemEntry

GAN = Composition(
    name="duolift-gan",
    views=("frontal", "lateral"),
    encoder=EncoderConfig(
        kind="dense", init_features=64, growth_rate=32, bottleneck_channels=128, block_config=(6, 12, 24, 16)
    ),
    lifting=LiftingConfig(kind="duo", along="axes", coarsest="features"),
    fusion=FusionConfig(kind="concatenate", view_decoders=False),
    decoder=DecoderConfig(kind="unet++", channels=(256, 128, 64, 32, 16), blocks=1, head_kernel=1, output="leaky_relu"),
    discriminator=DiscriminatorConfig(kind="cnn", channels=(64, 128, 256, 512), conditional=False),
    loss=ReconstructionLoss(
        adversarial_weight=0.1, mse_weight=10.0, projection_weight=0.0, lung_weight=10.0, deep_supervision_weight=0.5
    ),
    checkpointing="all",
)
CNN = replace(GAN, name="duolift-cnn", loss=replace(GAN.loss, adversarial_weight=0.0))

PAPER = "Zhang and Ying 2024, arXiv 2411.07941"

DUOLIFT_GAN = SystemEntry(
    title="DuoLift-GAN",
    summary="features and radiographs lifted side by side into a U-Net++, a loss inside the lungs",
    paper=PAPER,
    year=2024,
    views="1 or 2",
    kind="GAN",
    full=GAN,
    slim=slim(GAN),
    tiny=tiny(GAN),
    single_view=replace(GAN, views=("frontal",)),
)
DUOLIFT_CNN = SystemEntry(
    title="DuoLift-CNN",
    summary="DuoLift-GAN's generator without the adversarial term",
    paper=PAPER,
    year=2024,
    views="1 or 2",
    kind="regression",
    full=CNN,
    slim=slim(CNN),
    tiny=tiny(CNN),
)
