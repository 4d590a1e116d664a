"""u-X2CTGAN (Adwait et al. 2024, Boston University EC 523): volumes from radiographs alone, by reprojection.

```
per view: dense encoder, growth rate 16, 4 layers per stage -> lift at every size -+
                                                                                   +-> concatenated -> decoder -> volume
volume -> projector -> normalized -> squared error with the radiographs, 2-D discriminator
```

As published: a dense encoder with a growth rate of 16 and four layers per block for each view, features lifted and
concatenated, transposed convolutions up from 4 per side, no CT as ground truth; the loss is reprojection in both views,
0.1 total variation and an adversarial term on reprojected views, each divided by its own value and normalized to a sum
of one; one 2-D discriminator for both views (64, 128, 256 channels, then the mean over the image); 1e-4 times the sum
of squared parameters for both networks (which is Adam's weight decay of 2e-4); Adam at 1e-4, betas 0.5 and 0.999, batch
16, 50 epochs of 3,388 pairs.

Corrected here:

* the published generator's loss is computed on a volume without gradients, so that only the weight decay trains it;
* the published lifted features start at a depth of one, so that a square image of 100 pixels becomes 16 x 800 x 800
  voxels, and the lateral is concatenated with the frontal without a rotation. Here features are repeated along each
  view's own axis at every size, which gives a cube in the patient's axes;
* the published projections are sums over voxels of any scale against images of 0 to 255. Here they are line integrals
  through the archive's geometry, normalized as the radiographs are, and the scale that this removes comes from the
  thickness of an adult (`ReprojectionLoss.thickness_error`);
* batch norm in the discriminator is instance norm.

Not published; chosen here: five stages (the public code has one, with a small receptive field), 32 channels
in the stem, widths of 128 to 16, skip connections at every size as in X2CT-GAN, and a sigmoid at the end where the
public code has no activation: values outside the window are clipped before projection and would have no gradient.
"""

from __future__ import annotations

from dataclasses import replace

from raylift.models.objectives.reprojection import ReprojectionLoss
from raylift.models.parts.decoders import DecoderConfig
from raylift.models.parts.discriminators import ViewDiscriminatorConfig
from raylift.models.parts.encoders import EncoderConfig
from raylift.models.parts.fusion import FusionConfig
from raylift.models.parts.lifting import LiftingConfig
from raylift.models.reprojection_composition import ReprojectionComposition
from raylift.models.slimming import slim, tiny
from raylift.models.system_entry import SLIM_TRAINING, TINY_TRAINING, SystemEntry, Training

FULL = ReprojectionComposition(
    name="u-x2ctgan",
    views=("frontal", "lateral"),
    encoder=EncoderConfig(
        kind="dense", init_features=32, growth_rate=16, bottleneck_channels=64, block_config=(4, 4, 4, 4, 4)
    ),
    lifting=LiftingConfig(kind="repeat_conv", along="axes", coarsest="features"),
    fusion=FusionConfig(kind="concatenate", view_decoders=False),
    decoder=DecoderConfig(
        kind="upsampling", channels=(128, 64, 32, 32, 16, 16), blocks=1, head_kernel=3, output="sigmoid"
    ),
    discriminator=ViewDiscriminatorConfig(channels=(64, 128, 256), pooled=True, conditional=False),
    loss=ReprojectionLoss(
        reprojection_weight=1.0, total_variation_weight=0.1, adversarial_weight=1.0, thickness_weight=1.0, balanced=True
    ),
)

# Adam's decay adds itself times a weight to the gradient: twice the factor of the sum of squares.
DECAY = 2e-4

U_X2CTGAN = SystemEntry(
    title="u-X2CTGAN",
    summary="a network like X2CT-GAN's, supervised by reprojection and total variation",
    paper="Adwait et al. 2024, Boston University",
    year=2024,
    views="2",
    kind="reprojection",
    full=FULL,
    slim=slim(FULL),
    tiny=tiny(FULL),
    training=Training(
        # 3,388 pairs in batches of 16, the last of them short, are 212 steps.
        steps=50 * 212,
        batch_size=16,
        gradient_accumulation_steps=4,
        lr=1e-4,
        betas=(0.5, 0.999),
        decay_start=1.0,
        weight_decay=DECAY,
    ),
    slim_training=replace(SLIM_TRAINING, weight_decay=DECAY),
    tiny_training=replace(TINY_TRAINING, weight_decay=DECAY),
)
