"""Render the figures of the documentation: phantoms, and a pair of radiographs that is in the public domain.

`python docs/figures.py` renders the sheet of phantoms; `--frontal` and `--lateral` with the CC0 pair render what the
model in the package makes of it, a phantom that it was not trained on, and augmented pairs of a phantom next
to that pair; `--page http://127.0.0.1:8000` takes a screenshot of a running service's page, on the page's own example.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch

from raylift.datasets.augmentation.augmentation import Augmentation, augment
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import normalized_drrs
from raylift.datasets.radiographs.decoding import read_file
from raylift.datasets.radiographs.preparation import load_radiograph, prepare
from raylift.models import weights
from raylift.serve.reconstructor import prepare_radiographs

mpl.use("Agg")
from matplotlib import pyplot as plt

IMAGES = Path(__file__).parent / "images"
COLUMNS = ("axial", "coronal", "sagittal", "frontal X-ray", "lateral X-ray")
LUNG_AND_TISSUE_HU = (-1000, 450)
SOFTWARE_WEBGL = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
AUGMENTATION_CAPTION = (
    "One phantom at 128 voxels of 2.5 mm: its stored DRRs, six augmented pairs with a coronal slice of each deformed "
    "volume, and a pair of films (CC0)."
)
PRETRAINED = Path(__file__).parents[1] / "models/pretrained"
RECONSTRUCTION_CAPTION = (
    "models:chest-64 and models:chest-64-frontal (64 voxels of 5 mm). First two rows: a CC0 pair, of which no CT "
    "exists to compare with.\nBelow: a phantom that they were not trained on, and the ground truth."
)
CAPTION = (
    "Four procedural phantoms at 128 voxels of 2.5 mm: three planes in Hounsfield units ({} to {} HU), and the "
    "radiographs projected from them."
)


def phantom_sheet(path: Path, seeds: tuple[int, ...] = (12, 21, 5, 25), grid: Grid = Grid(128, 2.5)) -> None:  # noqa: B008
    """One row per seed, one column per plane or projection."""
    low, high = LUNG_AND_TISSUE_HU
    side = 2.2
    figure, axes = plt.subplots(
        len(seeds), len(COLUMNS), figsize=(side * len(COLUMNS), side * len(seeds) + 0.7), facecolor="black"
    )
    for row, seed in zip(axes, seeds, strict=True):
        hu, _ = thorax(seed, grid)
        d, h, w = (round(share * grid.size) for share in (0.53, 0.47, 0.50))
        planes = [(plane - low) / (high - low) for plane in (hu[d], hu[:, h], hu[:, :, w])]
        for panel, image in zip(row, [*planes, *normalized_drrs(hu, grid, chest(grid))], strict=True):
            panel.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
            panel.axis("off")
    for panel, name in zip(axes[0], COLUMNS, strict=True):
        panel.set_title(name, color="0.85", fontsize=11)
    figure.text(0.5, 0.012, CAPTION.format(low, high), color="0.6", fontsize=8.5, ha="center")
    figure.subplots_adjust(left=0.004, right=0.996, bottom=0.045, top=0.955, wspace=0.02, hspace=0.02)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor="black", metadata={"Software": None})
    plt.close(figure)


def reconstruction_sheet(frontal: Path, lateral: Path, path: Path, seed: int = 10_000_005) -> None:
    """Reconstructions by the models in the package of a real pair and of a phantom, and that phantom's CT."""
    files = {"frontal": frontal, "lateral": lateral}
    pixels = {name: read_file(file, view=name).pixels for name, file in files.items()}
    real, synthetic = [], []
    for name in ("chest-64", "chest-64-frontal"):
        model = weights.load(PRETRAINED / name)
        description, grid = model.description, model.description.grid
        views = description.geometry.views
        hu, _ = thorax(seed, grid)
        images = {view.name: load_radiograph(files[view.name], view).image for view in views}
        drrs = np.stack(normalized_drrs(hu, grid, description.geometry))
        of_pair, of_phantom = (
            description.window.to_hu(model.network(torch.from_numpy(inputs)[None]))[0, 0].numpy()
            for inputs in (prepare_radiographs(images, description), drrs)
        )
        kind = "a pair" if len(views) == 2 else "the frontal radiograph alone"
        real.append((f"real radiographs: {kind}", [pixels[view.name] for view in views], of_pair))
        synthetic.append((f"DRRs of a phantom: {kind}", drrs, of_phantom))
    rows = [*real, *synthetic, ("its CT", [], hu)]
    low, high = LUNG_AND_TISSUE_HU
    figure, axes = plt.subplots(5, 5, figsize=(11, 11.8), facecolor="black")
    d, h, w = (round(share * grid.size) for share in (0.53, 0.47, 0.32))
    for row, (name, radiographs, volume) in zip(axes, rows, strict=True):
        for panel, image in zip(row, radiographs, strict=False):
            panel.imshow(image, cmap="gray")
        for panel, plane in zip(row[2:], (volume[d], volume[:, h], volume[:, :, w]), strict=True):
            panel.imshow(plane, cmap="gray", vmin=low, vmax=high, interpolation="bicubic")
        row[0].text(0, 1.02, name, color="0.85", fontsize=10, transform=row[0].transAxes)
    for panel, name in zip(axes[0, 2:], ("axial", "coronal", "sagittal, right lung"), strict=True):
        panel.set_title(name, color="0.85", fontsize=10)
    for panel in axes.flat:
        panel.axis("off")
    figure.text(0.5, 0.008, RECONSTRUCTION_CAPTION, color="0.6", fontsize=8, ha="center")
    figure.subplots_adjust(left=0.004, right=0.996, bottom=0.045, top=0.965, wspace=0.02, hspace=0.1)
    figure.savefig(path, dpi=90, facecolor="black", metadata={"Software": None})
    plt.close(figure)


def augmentation_sheet(frontal: Path, lateral: Path, path: Path, seed: int = 12, grid: Grid = Grid(128, 2.5)) -> None:  # noqa: B008
    """A column for the stored pair, one for each of six augmented pairs, and one for a real pair."""
    hu = thorax(seed, grid)[0]
    parameters = [Augmentation().sample(0, 0, position, chest(grid)) for position in range(6)]
    source = torch.from_numpy(hu).float()[None, None].expand(len(parameters), -1, -1, -1, -1)
    volumes, views = augment(source, grid.spacing_mm, grid, parameters)
    films = [
        load_radiograph(file, view).image for file, view in zip((frontal, lateral), chest(grid).views, strict=True)
    ]
    columns = [("stored", normalized_drrs(hu, grid, chest(grid)), hu)]
    columns += [
        (f"augmented {k + 1}", pair.numpy(), volume[0].numpy())
        for k, (pair, volume) in enumerate(zip(views, volumes, strict=True))
    ]
    columns += [("film", [prepare(film, grid.size) for film in films], None)]
    low, high = LUNG_AND_TISSUE_HU
    figure, axes = plt.subplots(3, len(columns), figsize=(1.9 * len(columns), 6.2), facecolor="black")
    for column, (name, pair, volume) in zip(axes.T, columns, strict=True):
        for panel, image in zip(column, pair, strict=False):
            panel.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
        if volume is not None:
            plane = volume[:, round(0.47 * grid.size)]
            column[2].imshow(plane, cmap="gray", vmin=low, vmax=high, interpolation="bicubic")
        column[0].set_title(name, color="0.85", fontsize=10)
    for panel in axes.flat:
        panel.axis("off")
    figure.text(0.5, 0.012, AUGMENTATION_CAPTION, color="0.6", fontsize=8.5, ha="center")
    figure.subplots_adjust(left=0.003, right=0.997, bottom=0.045, top=0.95, wspace=0.02, hspace=0.02)
    figure.savefig(path, dpi=100, facecolor="black", metadata={"Software": None})
    plt.close(figure)


def page(url: str, path: Path, width_px: int = 1080) -> None:
    """The service's page with its synthetic example reconstructed, in Chromium."""
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        # The sandbox needs rights that the root of a container does not have; the page is our own.
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", *SOFTWARE_WEBGL]
        )
        shown = browser.new_page(viewport={"width": width_px, "height": 900})
        shown.goto(url)
        shown.locator("#example").click()
        expect(shown.locator("#lateral-preview img")).to_be_visible()
        shown.locator("#reconstruct").click()
        expect(shown.locator("raylift-viewer")).to_have_attribute("data-state", "ready", timeout=60_000)
        expect(shown.locator("#reconstruct")).to_have_text("Reconstruct")
        shown.wait_for_timeout(1000)  # images fade in
        shown.screenshot(path=path, full_page=True)
        browser.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Render the figures of the documentation.")
    parser.add_argument("--page", metavar="URL", help="a running service, for a screenshot of its page")
    parser.add_argument("--frontal", type=Path, help="of the CC0 pair")
    parser.add_argument("--lateral", type=Path, help="of the CC0 pair")
    options = parser.parse_args()
    if options.frontal and options.lateral:
        reconstruction_sheet(options.frontal, options.lateral, IMAGES / "reconstruction.png")
        augmentation_sheet(options.frontal, options.lateral, IMAGES / "augmentation.png")
    phantom_sheet(IMAGES / "phantom.png")
    if options.page:
        page(options.page, IMAGES / "page.png")
