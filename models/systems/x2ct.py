"""X2CT-GAN and X2CT-CNN (Ying et al., CVPR 2019, arXiv 1905.06902): CT from one or two radiographs.

```
per view:  dense encoder -> every size lifted to 3-D (connection B); mean -> fully connected layer -> coarsest (A)
decode:    a decoder for each view -> views averaged at every size (connection C) -> replaces both views' features
                                                        `-> third decoder -> 7^3 convolution -> volume
```

The loss is 0.1 LSGAN, 10 mean squared error and 10 mean absolute error of three orthogonal mean projections; the CNN
has no adversarial term. Adam at 2e-4 with betas 0.5 and 0.99, batch 4, 100 epochs of 916 volumes: 50 at a constant
learning rate, 50 with a linear decay.

Different here, without effect on the function: lifted volumes lie in the patient's axes from the start, where the
public code permutes them at every fusion (kernels are transposed accordingly). The views' own volumes, whose loss
has weight 0 in the public code, are computed for deep supervision only.
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
from raylift.models.system_entry import TINY_TRAINING, ParameterCount, SystemEntry, Training

FRONTAL = ("frontal",)

GAN = Composition(
    name="x2ct-gan",
    views=("frontal", "lateral"),
    # A 7 x 7 stem of 64 channels at full size; five stages, each downsampling, of densely connected layers.
    encoder=EncoderConfig(
        kind="dense", init_features=64, growth_rate=32, bottleneck_channels=128, block_config=(6, 12, 24, 16, 6)
    ),
    lifting=LiftingConfig(kind="repeat_conv", along="axes", coarsest="vector", dropout=0.5),
    fusion=FusionConfig(kind="average", view_decoders=True),
    decoder=DecoderConfig(
        kind="upsampling",
        # From 4 voxels per side to 128.
        channels=(256, 128, 64, 32, 16, 16),
        blocks=1,
        view_blocks=2,
        coarsest_blocks=0,
        head="convolution",
        head_kernel=7,
        output="relu",
    ),
    discriminator=DiscriminatorConfig(kind="patch", channels=(64, 128, 256, 512), conditional=True),
    loss=ReconstructionLoss(adversarial_weight=0.1, mse_weight=10.0, projection_weight=10.0),
    checkpointing="none",
)
CNN = replace(GAN, name="x2ct-cnn", loss=replace(GAN.loss, adversarial_weight=0.0))

TRAINING = Training(
    size=128,
    normalization="maximum",
    steps=100 * 229,
    batch_size=4,
    lr=2e-4,
    betas=(0.5, 0.99),
    decay_start=0.5,
    weight_decay=0.0,
)
PAPER = "Ying et al., CVPR 2019, arXiv 1905.06902"
GENERATOR = (ParameterCount(61_740_467), ParameterCount(29_384_481, views=FRONTAL))

X2CT_GAN = SystemEntry(
    title="X2CT-GAN",
    summary="dense encoders, features lifted at every size, views averaged; patch discriminator",
    paper=PAPER,
    year=2019,
    views="1 or 2",
    kind="GAN",
    full=GAN,
    slim=slim(GAN),
    tiny=tiny(GAN),
    training=TRAINING,
    tiny_training=replace(TINY_TRAINING, lr=2e-4),
    parameters=(
        *GENERATOR,
        ParameterCount(11_055_169, "discriminator"),
        ParameterCount(11_051_073, "discriminator", FRONTAL),
    ),
    single_view=replace(GAN, views=FRONTAL),
    single_view_slim=replace(slim(GAN), views=FRONTAL),
)
X2CT_CNN = SystemEntry(
    title="X2CT-CNN",
    summary="X2CT-GAN's generator without the adversarial term",
    paper=PAPER,
    year=2019,
    views="1 or 2",
    kind="regression",
    full=CNN,
    slim=slim(CNN),
    tiny=tiny(CNN),
    training=TRAINING,
    parameters=GENERATOR,
)
