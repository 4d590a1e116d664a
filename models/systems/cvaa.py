"""CVAA-GAN (Qiao et al. 2024, arXiv 2408.09736): views weighted voxel by voxel as they are fused.

Two dense encoders; features repeated along the rays at every size and through a 3-D convolution; at the coarsest size
the views are summed, refined and grown. Above it a softmax over the views at each voxel, from a 7 x 7 x 7 convolution
on both views and what has grown, makes coarse features; a sigmoid mask distils fine ones; coarse, fine, sum and grown
features are concatenated, convolved once and grown. The discriminator judges patches beside radiographs lifted by a
learned 3-D block. LSGAN, squared error, three orthogonal projections; Adam at 2e-4 with betas 0.5 and 0.99, batch 4,
200 epochs of 212 volumes, HU in [-1000, 4096].

Not published, and chosen here: widths, number of sizes, dense layers, output and discriminator layers (X2CT-GAN's,
whose text the paper follows); all loss weights and L1 for the projections (the same); 16 channels
of a lifted radiograph in the discriminator (the generator's width at full size); a constant rate, then a straight line
to zero (no schedule is given).
"""

from __future__ import annotations

from raylift.models.composition import Composition
from raylift.models.parts.decoders import DecoderConfig
from raylift.models.parts.discriminators import DiscriminatorConfig
from raylift.models.parts.fusion import FusionConfig
from raylift.models.parts.lifting import LiftingConfig


def cvaa_gan(views: tuple[str, ...] = ("frontal", "lateral")) -> Composition:
    """Coarse-to-fine view attention alignment."""
    return Composition(
        name="cvaa-gan",
        views=views,
        lifting=LiftingConfig(coarsest="features"),
        fusion=FusionConfig(kind="alignment", feedback=False),
        decoder=DecoderConfig(blocks=0, coarsest_blocks=1),
        discriminator=DiscriminatorConfig(kind="lifted"),
    )
