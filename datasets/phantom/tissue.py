"""The HU of a phantom's tissues."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tissue:
    """HU of the tissues of one phantom."""

    fat: float
    muscle: float
    blood: float
    right_blood: float
    """Blood of the right heart, which contrast agent reaches first."""
    myocardium: float
    liver: float
    spleen: float
    kidney: float
    lung: float
    cortex: float
    marrow: float
    cartilage: float

    @classmethod
    def sample(cls, seed: int) -> Tissue:
        """The tissues of that seed; 40 % of phantoms have contrast agent."""
        rng = np.random.default_rng([seed, 9])
        contrast = rng.random() < 0.4
        blood = rng.uniform(150, 300) if contrast else rng.uniform(35, 50)
        return cls(
            fat=rng.uniform(-112, -95),
            muscle=rng.uniform(42, 62),
            blood=blood,
            right_blood=blood * rng.uniform(0.8, 1.15) if contrast else blood,
            myocardium=rng.uniform(85, 115) if contrast else blood + 3,
            liver=rng.uniform(85, 115) if contrast else rng.uniform(45, 65),
            spleen=rng.uniform(100, 125) if contrast else rng.uniform(42, 55),
            kidney=rng.uniform(140, 190) if contrast else rng.uniform(28, 36),
            lung=rng.uniform(-885, -840),
            cortex=rng.uniform(800, 1150),
            marrow=rng.uniform(110, 230),
            cartilage=rng.uniform(80, 150),
        )
