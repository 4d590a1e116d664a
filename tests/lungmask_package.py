"""A package with the interface of lungmask 0.2.22, whose weights are not here: `LMInferer` with a small network."""

from pathlib import Path

import torch

LOWER_HU, UPPER_HU = -950.5, 99.5
"""The network finds everything between these values, so consolidated lung and soft tissue too."""

MODULE = """
import numpy as np
import torch


class LMInferer:
    def __init__(self, modelname="R231", modelpath=None, fillmodel=None, fillmodel_path=None, force_cpu=False,
                 batch_size=20, volume_postprocessing=True, tqdm_disable=False):
        state = torch.load(modelpath, map_location="cpu")
        self.model = torch.nn.Conv2d(1, 1, 1)
        self.model.load_state_dict(state)

    def apply(self, image):
        assert image.ndim == 3
        slices = torch.as_tensor(image[:, None], dtype=torch.float32)
        with torch.inference_mode():
            lung = (self.model(slices)[:, 0].abs() < 1).numpy()
        right = np.arange(image.shape[2]) < image.shape[2] / 2
        return np.where(lung, np.where(right, 1, 2), 0).astype(np.uint8)
"""


def install(folder: Path) -> Path:
    """Write the package to a folder of `sys.path`; returns the file of its weights."""
    (folder / "lungmask.py").write_text(MODULE)
    information = folder / "lungmask-0.2.22.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: lungmask\nVersion: 0.2.22\n")
    # LOWER_HU becomes -1 and UPPER_HU 1.
    middle, half = (UPPER_HU + LOWER_HU) / 2, (UPPER_HU - LOWER_HU) / 2
    weights = {"weight": torch.full((1, 1, 1, 1), 1 / half), "bias": torch.tensor([-middle / half])}
    torch.save(weights, folder / "unet.pth")
    return folder / "unet.pth"
