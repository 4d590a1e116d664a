"""PSR, single-image tomography (Henzler et al. 2018, arXiv 1710.04867): a 2-D network whose channels are depths.

```
radiograph, at twice the volume's size -> residual encoder-decoder in 2-D -> a channel for every depth -> volume
```

The network is that of X2CT-GAN's public code (their baseline "2DCNN"), layer by layer: four poolings, sums as skip
connections at every size, depthwise upsampling, and two 1 x 1 convolutions to a channel for every depth; no convolution
has a bias, and all but the last and the upsampling ones are followed by batch norm and ReLU. 9,068,480 parameters for
256 -> 128.

Not published; chosen here: the paper's own layers and losses (mean squared error alone, as in that re-implementation,
with its weight decay of 1e-4); the learning rate (X2CT-GAN's). Different here: a radiograph of the volume's size is
resized to twice that inside; the paper's second step, which fuses the volume with the radiograph at a higher
resolution, is left out as in the re-implementation; several views' volumes are averaged, which the paper does not do.
"""

from __future__ import annotations

from dataclasses import replace

from raylift.models.composition import Composition
from raylift.models.objectives.adversarial import ReconstructionLoss
from raylift.models.parts.decoders import DecoderConfig
from raylift.models.parts.encoders import EncoderConfig
from raylift.models.parts.fusion import FusionConfig
from raylift.models.parts.lifting import LiftingConfig
from raylift.models.slimming import slim, tiny
from raylift.models.system_entry import SLIM_TRAINING, TINY_TRAINING, ParameterCount, SystemEntry, Training

FULL = Composition(
    name="psr",
    views=("frontal",),
    # 256 channels inside; residual blocks at each of the four sizes.
    encoder=EncoderConfig(kind="hourglass", init_features=64, block_config=(3, 3, 3, 5)),
    lifting=LiftingConfig(kind="channels", along="axes"),
    fusion=FusionConfig(kind="average", view_decoders=False),
    decoder=DecoderConfig(kind="none", channels=(1,), output="linear"),
    loss=ReconstructionLoss(adversarial_weight=0.0, mse_weight=1.0, projection_weight=0.0),
)

PSR = SystemEntry(
    title="PSR",
    summary="a 2-D encoder-decoder whose channels are depths",
    paper="Henzler et al. 2018, arXiv 1710.04867",
    year=2018,
    views="1",
    kind="regression",
    full=FULL,
    slim=slim(FULL),
    tiny=tiny(FULL),
    training=Training(weight_decay=1e-4),
    slim_training=replace(SLIM_TRAINING, weight_decay=1e-4),
    tiny_training=replace(TINY_TRAINING, weight_decay=1e-4),
    parameters=(ParameterCount(9_068_480, views=("frontal",)),),
)
