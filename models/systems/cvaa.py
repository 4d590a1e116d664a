"""CVAA-GAN (Qiao et al. 2024, arXiv 2408.09736): coarse-to-fine alignment, views weighted voxel by voxel.

```
at each size:  views and the volume from below -> 7^3 convolution -> softmax over the views -> coarse features
               coarse features and the volume from below -> sigmoid mask -> fine features
               coarse, fine, sum, volume from below -> concatenated -> one convolution -> upsampled
```

Two dense encoders; features repeated along the rays at every size, then a 3-D convolution. At the coarsest size the
views are summed and refined. The discriminator classifies patches, given radiographs lifted by a learned 3-D block.
LSGAN, squared error, three orthogonal projections; Adam at 2e-4 with betas 0.5 and 0.99, batch 4, 200 epochs of 212
volumes, HU in [-1000, 4096].

Not published, and chosen here: widths, number of sizes, dense layers, output and discriminator layers (X2CT-GAN's,
whose text the paper follows); all loss weights and L1 for the projections (the same); 16 channels of a lifted
radiograph in the discriminator (the generator's width at full size); X2CT-GAN's learning rate schedule (none is given).
The slim variant has the usual window: the published one is twice as wide, and lungs and tissue lie close
together in it, so that 300 steps did not reach what 60 do in the usual one.
"""

from __future__ import annotations

from raylift.datasets.intensity import Window
from raylift.models.composition import Composition
from raylift.models.objectives.adversarial import ReconstructionLoss
from raylift.models.parts.decoders import DecoderConfig
from raylift.models.parts.discriminators import DiscriminatorConfig
from raylift.models.parts.encoders import EncoderConfig
from raylift.models.parts.fusion import FusionConfig
from raylift.models.parts.lifting import LiftingConfig
from raylift.models.slimming import slim, tiny
from raylift.models.system_entry import SystemEntry, Training

FULL = Composition(
    name="cvaa-gan",
    views=("frontal", "lateral"),
    encoder=EncoderConfig(
        kind="dense", init_features=64, growth_rate=32, bottleneck_channels=128, block_config=(6, 12, 24, 16, 6)
    ),
    lifting=LiftingConfig(kind="repeat_conv", along="axes", coarsest="features"),
    fusion=FusionConfig(kind="alignment", view_decoders=False),
    decoder=DecoderConfig(
        kind="upsampling",
        channels=(256, 128, 64, 32, 16, 16),
        blocks=0,
        coarsest_blocks=1,
        head="convolution",
        head_kernel=7,
        output="relu",
    ),
    discriminator=DiscriminatorConfig(kind="lifted", channels=(64, 128, 256, 512), condition_channels=16),
    loss=ReconstructionLoss(adversarial_weight=0.1, mse_weight=10.0, projection_weight=10.0),
)

CVAA_GAN = SystemEntry(
    title="CVAA-GAN",
    summary="views weighted voxel by voxel, fusion from coarse to fine features",
    paper="Qiao et al. 2024, arXiv 2408.09736",
    year=2024,
    views="2",
    kind="GAN",
    full=FULL,
    slim=slim(FULL),
    tiny=tiny(FULL),
    training=Training(window=Window(-1000.0, 4096.0), steps=200 * 53),
    spacing_mm=2.0,
)
