"""TRCT-GAN (Wang et al. 2023, Digital Signal Processing 140:104123): transformers between radiograph and volume.

Known from the abstract alone: a GAN from two views, a transformer module on the features of the radiographs, and a
dynamic attention module that ties 2-D and 3-D features together. The rest is ours:

* six transformer blocks of eight heads (the numbers of a public attempt) on the features before the encoder's last
  stage, 64 tokens at 128 voxels a side, with sines as positions;
* for the tie, voxels of the volumes up to 16 a side ask all pixels of their view's features of the same size, beside
  the features of their own ray;
* views fused by a softmax at each voxel, from each view and what has grown;
* X2CT-GAN's dense encoder, upsampling decoder, head, discriminator, losses and schedule around it.

A public attempt broadcast one vector along two axes of the volume and dropped the skips, so that no detail of the
radiographs could reach its output. Here every size has its own lifted features, and a test holds that a pixel moves
the voxels on its ray most.
"""

from __future__ import annotations

from raylift.models.composition import Composition
from raylift.models.parts.decoders import DecoderConfig
from raylift.models.parts.encoders import EncoderConfig
from raylift.models.parts.fusion import FusionConfig
from raylift.models.parts.lifting import LiftingConfig


def trct_gan(views: tuple[str, ...] = ("frontal", "lateral")) -> Composition:
    """Attention within the image, from voxels to pixels, and over the views."""
    return Composition(
        name="trct-gan",
        views=views,
        encoder=EncoderConfig(kind="transformer"),
        lifting=LiftingConfig(kind="attention", coarsest="features"),
        fusion=FusionConfig(kind="attention", feedback=False),
        decoder=DecoderConfig(blocks=2),
    )
