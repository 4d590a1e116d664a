"""X2CT-GAN (Ying et al., CVPR 2019, arXiv 1905.06902): CT from one or two radiographs by lifted dense features.

Each view has an encoder, lifts its features at every size, and decodes them; after each join the views are fused, the
fusion replaces both views' features, and a third decoder grows the volume that counts. At the published settings the
biplanar generator has 61,740,467 parameters, the single-view one 29,384,481, the discriminators 11,055,169 and
11,051,073.

Ours in the same network: lifted volumes stand in the patient's axes from the start, where theirs are permuted at every
fusion (same function, kernels transposed); and the views' own heads, whose output has no weight in the published
loss, exist but are computed for deep supervision only.
"""

from __future__ import annotations

from raylift.models.composition import Composition
from raylift.models.objectives.adversarial import ReconstructionLoss


def x2ct_gan(views: tuple[str, ...] = ("frontal", "lateral")) -> Composition:
    """The published system, which is what a composition's defaults are."""
    return Composition(name="x2ct-gan", views=views)


def x2ct_cnn(views: tuple[str, ...] = ("frontal", "lateral")) -> Composition:
    """The same generator without the adversarial term."""
    return Composition(name="x2ct-cnn", views=views, loss=ReconstructionLoss(adversarial=0.0))
