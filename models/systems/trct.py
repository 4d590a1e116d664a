"""TRCT-GAN (Wang et al. 2023, Digital Signal Processing 140:104123): transformers between radiograph and volume.

```
dense encoder with transformer blocks before its last stage
lift at every size; voxels of volumes up to 16^3 also attend to all pixels of their view
views weighted by a softmax at each voxel -> X2CT-GAN's decoder -> volume
```

Known from the abstract alone: a GAN from two views, a transformer module on the features of the radiographs, and a
dynamic attention module between 2-D and 3-D features. The rest is chosen here:

* six transformer blocks of eight heads (the numbers of a public attempt) on the features before the encoder's last
  stage, 64 tokens at 128 voxels per side, with sinusoidal positions;
* cross-attention for the dynamic module: voxels of the volumes up to 16 per side are queries, all pixels of their
  view's features of the same size are keys and values, in addition to the features of their own ray;
* views fused by a softmax at each voxel, from each view and the volume from below;
* X2CT-GAN's dense encoder, decoder, head, discriminator, losses and schedule around it.

A public attempt broadcast one vector along two axes of the volume and dropped the skip connections, so that no detail
of the radiographs could reach its output. Here every size has its own lifted features, and a test verifies that a pixel
changes the voxels on its ray most.
"""

from __future__ import annotations

from raylift.models.composition import Composition
from raylift.models.objectives.adversarial import ReconstructionLoss
from raylift.models.parts.decoders import DecoderConfig
from raylift.models.parts.discriminators import DiscriminatorConfig
from raylift.models.parts.encoders import EncoderConfig
from raylift.models.parts.fusion import FusionConfig
from raylift.models.parts.lifting import LiftingConfig
from raylift.models.slimming import slim, tiny
from raylift.models.system_entry import SystemEntry

FULL = Composition(
    name="trct-gan",
    views=("frontal", "lateral"),
    encoder=EncoderConfig(
        kind="transformer",
        init_features=64,
        growth_rate=32,
        bottleneck_channels=128,
        block_config=(6, 12, 24, 16, 6),
        transformer_blocks=6,
        heads=8,
    ),
    lifting=LiftingConfig(kind="attention", along="axes", coarsest="features", heads=4),
    fusion=FusionConfig(kind="attention", view_decoders=False),
    decoder=DecoderConfig(
        kind="upsampling",
        channels=(256, 128, 64, 32, 16, 16),
        blocks=2,
        coarsest_blocks=0,
        head="convolution",
        head_kernel=7,
        output="relu",
    ),
    discriminator=DiscriminatorConfig(kind="patch", channels=(64, 128, 256, 512), conditional=True),
    loss=ReconstructionLoss(adversarial_weight=0.1, mse_weight=10.0, projection_weight=10.0),
)

TRCT_GAN = SystemEntry(
    title="TRCT-GAN",
    summary="transformers in the encoder, cross-attention from voxels to pixels",
    paper="Wang et al. 2023, DSP 140:104123",
    year=2023,
    views="2",
    kind="GAN",
    full=FULL,
    slim=slim(FULL),
    tiny=tiny(FULL),
)
