"""u-X2CTGAN (Adwait et al. 2024, Boston University EC 523): volumes from radiographs alone, taught by re-projection.

Theirs, and kept: a dense encoder of growth 16 and four layers a block for each view, features lifted and concatenated,
transposed convolutions up from 4 a side, volumes without CT to compare with; the loss is re-projection in both views,
0.1 total variation and an adversarial term on re-projected views, each divided by its own value and brought to a sum
of one; one 2-D discriminator for both views (64, 128, 256 channels, then the mean over the image); 1e-4 times the sum
of squared parameters for both players (which is Adam's weight decay of 2e-4: the preset's); Adam at 1e-4, betas 0.5 and
0.999, batch 16, 50 epochs of 3,388 pairs.

Corrected here:

* their generator's loss was computed on a volume made without gradients, so that only the weight decay taught it;
* their lifted features start at a depth of one, so that a square image of 100 pixels becomes 16 x 800 x 800 voxels, and
  the lateral is joined to the frontal unturned. Here features are repeated along each view's own axis at every size,
  which makes a cube in which both views stand where they were taken;
* their projections are sums over voxels of any scale against images of 0 to 255. Here they are line integrals through
  the archive's geometry, standardized as the radiographs are, and the scale that this takes away comes from the
  thickness of an adult (`ReprojectionLoss.calibration`, ours);
* batch norm in the discriminator is instance norm.

Not given, and chosen: five stages (one, in theirs, which sees little of a radiograph), 32 channels in the stem, widths
of 128 to 16, skips at every size as X2CT-GAN has them, and a sigmoid at the end where theirs has nothing: what is less
than air or more than the window's bone has no projection.
"""

from __future__ import annotations

from raylift.models.parts.decoders import DecoderConfig
from raylift.models.parts.encoders import EncoderConfig
from raylift.models.parts.fusion import FusionConfig
from raylift.models.parts.lifting import LiftingConfig
from raylift.models.xray_only import Reprojected


def u_x2ctgan(views: tuple[str, ...] = ("frontal", "lateral")) -> Reprojected:
    """Dense encoders, concatenation, a balanced loss."""
    return Reprojected(
        name="u-x2ctgan",
        views=views,
        encoder=EncoderConfig(stem=32, growth=16, bottleneck=64, layers=(4, 4, 4, 4, 4)),
        lifting=LiftingConfig(coarsest="features"),
        fusion=FusionConfig(kind="concatenate", feedback=False),
        decoder=DecoderConfig(channels=(128, 64, 32, 32, 16, 16), head_kernel=3, output="sigmoid"),
    )
