"""3DCNN (Kasten et al. 2020, arXiv 2004.00871): repeated radiographs through a residual 3-D encoder-decoder.

```
each radiograph -> repeated along its rays -> one channel of a volume -> residual 3-D U-Net -> volume
```

Nothing is learned in 2-D. The network resembles V-Net, with 3 x 3 x 3 convolutions, max pooling and concatenated skip
connections. The paper segments knee bones; as a baseline of reconstruction the network regresses intensities here.

Not published, and chosen here: widths of 8 to 128 over four poolings and one residual unit of two convolutions per size
(those of the xrayto3D benchmark's version); instance norm in place of its batch norm, because batches of four
volumes on several workers give poor statistics; a linear output, because intensities are regressed; learning rate and
schedule (X2CT-GAN's). The paper's loss is a weighted cross-entropy and the correlation of gradients between projections
and radiographs; for intensities it is mean squared error and X2CT-GAN's projection term.
"""

from __future__ import annotations

from raylift.models.composition import Composition
from raylift.models.objectives.adversarial import ReconstructionLoss
from raylift.models.parts.decoders import DecoderConfig
from raylift.models.parts.encoders import EncoderConfig
from raylift.models.parts.fusion import FusionConfig
from raylift.models.parts.lifting import LiftingConfig
from raylift.models.slimming import slim, tiny
from raylift.models.system_entry import SystemEntry

FULL = Composition(
    name="3dcnn",
    views=("frontal", "lateral"),
    encoder=EncoderConfig(kind="identity"),
    lifting=LiftingConfig(kind="repeat", along="axes"),
    fusion=FusionConfig(kind="concatenate", view_decoders=False),
    decoder=DecoderConfig(kind="unet", channels=(128, 64, 32, 16, 8), blocks=1, head_kernel=1, output="linear"),
    loss=ReconstructionLoss(adversarial_weight=0.0, mse_weight=10.0, projection_weight=10.0),
)

CNN3D = SystemEntry(
    title="3DCNN",
    summary="repeated radiographs through a residual 3-D U-Net",
    paper="Kasten et al. 2020, arXiv 2004.00871",
    year=2020,
    views="2",
    kind="regression",
    full=FULL,
    slim=slim(FULL),
    tiny=tiny(FULL),
)
