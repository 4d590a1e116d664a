"""cGAN-128 (Adwait et al. 2024, Boston University EC 523): a conditional GAN from radiographs to a volume.

```
per view:  2-D U-Net of 64 to 1,024 channels -> a channel for every depth of its rays -+
                                                                                       +-> 3-D U-Net -> volume
reprojected frontal with the given lateral, and the reverse -> 2-D discriminator
```

As published: a 2-D U-Net of 64 to 1,024 channels, a 2-D patch discriminator of 64, 128 and 256 channels with the
radiographs as condition, cross-entropy plus the squared errors of both views with equal weights, Adam at 1e-4, batch 4.

Corrected here:

* their output is one image, stacked 64 times. Here the U-Net's last map has a channel for every depth along the view's
  rays and becomes a volume (as in PSR), and a small residual 3-D U-Net makes one volume of the views';
* their lateral view is the frontal one under another name, because the name they replace does not occur. Here it
  is the lateral, and both views go through the same U-Net, each along its own rays;
* the published discriminator has an image and the one it was made from as its input. Here that pair could be
  classified by subtraction, so the input is both views of a patient, one of them reprojected and the other as given: a
  reprojected lateral must match this frontal.

Squared errors are those of normalized reprojections, with the scale from the thickness of an adult, as in u-X2CTGAN.
Not published; chosen here: widths of 32, 16 and 8 in 3-D, a sigmoid at the end. The public code trains it for one
epoch, and its CycleGAN for 40; here it is trained for 40 too.
"""

from __future__ import annotations

from raylift.models.objectives.reprojection import ReprojectionLoss
from raylift.models.parts.decoders import DecoderConfig
from raylift.models.parts.discriminators import ViewDiscriminatorConfig
from raylift.models.parts.encoders import EncoderConfig
from raylift.models.parts.fusion import FusionConfig
from raylift.models.parts.lifting import LiftingConfig
from raylift.models.reprojection_composition import ReprojectionComposition
from raylift.models.slimming import slim, tiny
from raylift.models.system_entry import SystemEntry, Training

FULL = ReprojectionComposition(
    name="cgan-128",
    views=("frontal", "lateral"),
    # Four downsamplings, each doubling the channels.
    encoder=EncoderConfig(kind="unet", init_features=64, block_config=(2, 2, 2, 2)),
    lifting=LiftingConfig(kind="channels", along="rays"),
    fusion=FusionConfig(kind="concatenate", view_decoders=False),
    decoder=DecoderConfig(kind="unet", channels=(32, 16, 8), blocks=1, head_kernel=3, output="sigmoid"),
    discriminator=ViewDiscriminatorConfig(channels=(64, 128, 256), pooled=False, conditional=True),
    # Two views' errors, each with weight 1, are twice their mean.
    loss=ReprojectionLoss(
        reprojection_weight=2.0,
        total_variation_weight=0.0,
        adversarial_weight=1.0,
        thickness_weight=1.0,
        balanced=False,
    ),
)

CGAN_128 = SystemEntry(
    title="cGAN-128",
    summary="a 2-D U-Net for each view, channels are depths along the rays; a discriminator of pairs of views",
    paper="Adwait et al. 2024, Boston University",
    year=2024,
    views="2",
    kind="reprojection",
    full=FULL,
    slim=slim(FULL),
    tiny=tiny(FULL),
    # 2,873 pairs in batches of 4 are 719 steps.
    training=Training(steps=40 * 719, batch_size=4, lr=1e-4, betas=(0.5, 0.999), decay_start=1.0),
)
