"""X-Recon (Wang et al. 2024, arXiv 2407.15356): X2CT-GAN's views, an intensity at every size, cone-beam projections.

```
X2CT-GAN's views with lighter encoders; at each size: average, volume from below -> 1^3 convolution -> intensities
intensities combined from coarse to fine: ((coarsest / 2, doubled) + next) / 2, ...
```

Encoders, lifting and view decoders are X2CT-GAN's with lighter dense blocks of 4, 8, 16, 8 and 4 layers. Multi-scale
fusion rendering replaces the head. The discriminator's first layer has coordinates as channels. The loss is 10 times
squared error, 0.1 times L1 of three cone-beam projections, whose poses are all rotated by the same N(0, 10 degrees)
about each axis and shifted by the same N(0, 8 voxels) at every step, and LSGAN with weight 1 for both networks. Adam at
5e-5, betas 0.5 and 0.99, batch 1, 100 epochs constant and 100 decaying, 224^3 voxels of 1.6 mm. The generator has
98,799,735 parameters at 224 and 37,517,943 at 128, the discriminator 11,067,457; the fused decoder's last size, which
nothing reads, is among them and is not computed.

Different here: projections come from raylift's projector with the published source, detector and step, where a volume
of any size fills 128 units, as in the published, normalized coordinates. Assumed: the number of training volumes, which
is not clear from the paper and the code; the steps are 200 epochs of the 916 volumes that X2CT-GAN trains on. bf16 and
activation checkpointing let 224^3 fit one GPU.
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
from raylift.models.system_entry import ParameterCount, SystemEntry, Training

FULL = Composition(
    name="x-recon",
    views=("frontal", "lateral"),
    encoder=EncoderConfig(
        kind="dense", init_features=64, growth_rate=32, bottleneck_channels=128, block_config=(4, 8, 16, 8, 4)
    ),
    lifting=LiftingConfig(kind="repeat_conv", along="axes", coarsest="vector", dropout=0.5),
    fusion=FusionConfig(kind="average", view_decoders=True),
    decoder=DecoderConfig(
        kind="upsampling",
        channels=(256, 128, 64, 32, 16, 16),
        blocks=1,
        view_blocks=2,
        head="rendering",
        output="leaky_relu",
    ),
    discriminator=DiscriminatorConfig(kind="coordinate", channels=(64, 128, 256, 512), conditional=True),
    loss=ReconstructionLoss(
        adversarial_weight=1.0,
        mse_weight=10.0,
        projection_weight=0.0,
        cone_projection_weight=0.1,
        cone_jitter_deg=10.0,
        cone_jitter_voxels=8.0,
    ),
    checkpointing="all",
)

X_RECON = SystemEntry(
    title="X-Recon",
    summary="X2CT-GAN's views, an intensity at every size, jittered cone-beam projections in the loss",
    paper="Wang et al. 2024, arXiv 2407.15356",
    year=2024,
    views="2",
    kind="GAN",
    full=FULL,
    slim=slim(FULL),
    tiny=tiny(FULL),
    training=Training(size=224, steps=200 * 916, batch_size=1, lr=5e-5, precision="bf16"),
    spacing_mm=1.6,
    parameters=(
        ParameterCount(98_799_735, size=224),
        ParameterCount(37_517_943, size=128),
        ParameterCount(11_067_457, "discriminator", size=224),
    ),
)
