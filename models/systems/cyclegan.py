"""CycleGAN-B and CycleGAN-F (Adwait et al. 2024, Boston University EC 523): unpaired radiographs and volumes.

Theirs, and kept: the generator of volumes (7 x 7 to 64 channels, two halvings to 256, a 1 x 1 x 1 convolution in 3-D,
six residual blocks, two transposed convolutions, 7 x 7 x 7, dropout 0.3), the generator of radiographs (64, 128, 256
channels, the depth folded into them), the patch discriminator of volumes (X2CT-GAN's widths); L1 cycles times 15,
cross-entropy with real ones called 0.9, gradients clipped at 1, discriminators in every second step, Adam at 1e-5 with
betas 0.5 and 0.999, batch 16, 64 voxels a side, 40 epochs (B) or 50 (F) of 2,873 pairs.

Corrected here:

* their real volumes were Gaussian noise. Here they are CT of other people where a run has any, and otherwise
  procedural thoraces, which is said in the log and beside the weights;
* the last layer of their generator of radiographs was made anew with random weights at every call. Here it is trained,
  and a discriminator of radiographs judges what it makes; or the projector itself takes its place
  (`system.projection projector`);
* their views were stacked as channels and turned and jittered each by itself. Here each has an encoder and stands
  along its own axis (`system.placement stacked` gives the first back), and nothing is jittered;
* their features start at a depth of one, grow to 32 and are stretched to 64. Here they fill the cube from the start,
  and voxels know their depth.

Chosen: volumes in [0, 1] by a sigmoid, which is their tanh in other units; weights from N(0, 0.02) where they have
Kaiming's, of which the instance norms leave no trace but in the last layer; the smoothed target for the
discriminators alone; a discriminator of radiographs of 64, 128 and 256 channels; no dropout in discriminators.
"""

from __future__ import annotations

from raylift.models.parts.cyclegan_networks import CycleGan


def cyclegan_b(views: tuple[str, ...] = ("frontal", "lateral")) -> CycleGan:
    """From two views."""
    return CycleGan(name="cyclegan-b", views=views)


def cyclegan_f(views: tuple[str, ...] = ("frontal",)) -> CycleGan:
    """From the frontal alone."""
    return CycleGan(name="cyclegan-f", views=views)
