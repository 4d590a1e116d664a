"""Unrolled reconstruction, a system of raylift's own: back-projected features, data consistency and a 3-D U-Net.

A 2-D residual U-Net, shared by all views and conditioned by each view's pose, extracts features at several sizes. They
are back-projected along the true rays into volumes and averaged over the views. A 3-D residual U-Net predicts a first
volume from them. Each further iteration projects the volume with raylift's differentiable projector, matches each
projection to its radiograph by a gain and an offset in closed form (a radiograph's scale is unknown), encodes the
residual with a small 2-D network, back-projects these features, and predicts a correction with the same 3-D U-Net,
conditioned by the iteration.

Related work: learned primal-dual (Adler and Oktem 2018, arXiv 1707.06474), variational networks
(Hammernik et al. 2018, arXiv 1704.00447). No weight belongs to a pose, so the same weights accept any
number of views in any pose; the accuracy depends on the views of their training.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, Grid, View
from raylift.datasets.intensity import Window, hu_to_attenuation
from raylift.datasets.projector import backproject, project
from raylift.models.consistency import fit_gain_and_offset
from raylift.models.objectives.adversarial import ReconstructionLoss, reconstruction_objective
from raylift.models.objectives.objective import Objective
from raylift.models.parts.blocks import group_norm
from raylift.models.parts.divisibility import require_divisible_size
from raylift.models.parts.encoders import at_size
from raylift.models.parts.residual_unet import ResidualUNet
from raylift.models.system_config import DEFAULT_WINDOW, SystemConfig
from raylift.models.system_entry import SLIM_TRAINING, TINY_TRAINING, SystemEntry, Training
from raylift.models.volume_network import VolumeNetwork

POSE_VALUES = 11
"""Values of a pose (`_pose`): two unit vectors, an offset, the source distance and the pixel size."""


@dataclass(frozen=True)
class Unrolled(SystemConfig):
    """Settings of the unrolled reconstruction; the defaults are for 64 voxels per side."""

    name: Literal["unrolled"] = "unrolled"
    views: tuple[str, ...] = ("frontal", "lateral")
    """Names of views of the archive's geometry; `all`: every one of them when a run starts."""
    iterations: int = 3
    """Passes of the 3-D U-Net; the first has no data consistency."""
    image_channels: tuple[int, ...] = (24, 48, 96, 128)
    """Channels of the 2-D U-Net at each size, finest first."""
    lifted_channels: tuple[int, ...] = (16, 32, 48, 64)
    """Channels of the back-projected features at each size, finest first."""
    volume_channels: tuple[int, ...] = (16, 48, 96, 128)
    """Channels of the 3-D U-Net at each size, finest first."""
    residual_channels: int = 8
    """Channels of the back-projected features of the residuals."""
    blocks: int = 1
    """Residual blocks at each size of both U-Nets, in the encoder and in the decoder."""
    window: Window = field(default_factory=Window)
    """The HU range of the network's [0, 1], from which it computes attenuation; the data's window must be the same."""
    loss: ReconstructionLoss = field(
        default_factory=lambda: ReconstructionLoss(
            adversarial_weight=0.0,
            mse_weight=10.0,
            l1_weight=0.5,
            projection_weight=0.0,
            ssim_weight=0.1,
            deep_supervision_weight=0.3,
        )
    )
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, which is validated and exported."""

    def __post_init__(self) -> None:
        levels = {len(self.image_channels), len(self.lifted_channels), len(self.volume_channels)}
        if len(levels) != 1 or not self.volume_channels:
            raise ConfigError("image_channels, lifted_channels and volume_channels: give as many of each, one or more")
        if self.iterations < 1 or self.blocks < 1 or self.residual_channels < 1:
            raise ConfigError("iterations, blocks and residual_channels: give 1 or more of each")

    @property
    def any_views(self) -> bool:
        """Nothing in the network belongs to a pose."""
        return True

    @property
    def channels_last(self) -> bool:
        """On CPU cores its convolutions are faster in channels-last layout."""
        return True

    def reconstruction_network(self, grid: Grid, geometry: Geometry) -> UnrolledNetwork:
        """The network; its parameters do not depend on the number of views or their poses."""
        return UnrolledNetwork(self, grid, geometry)

    def objective(self, grid: Grid, geometry: Geometry, window: Window = DEFAULT_WINDOW) -> Objective:
        """Supervised regression on volumes, with an exponential moving average of the weights."""
        if window != self.window:
            raise ConfigError(f"data.window is {window} and system.window {self.window}: give both the same")
        objective = reconstruction_objective(self.reconstruction_network(grid, geometry), None, self.loss)
        return replace(objective, ema_decay=self.ema_decay)


class UnrolledNetwork(VolumeNetwork):
    """Radiographs to a volume by unrolled iterations."""

    def __init__(self, system: Unrolled, grid: Grid, geometry: Geometry) -> None:
        super().__init__()
        levels = len(system.volume_channels)
        require_divisible_size(grid.size, 2 ** (levels - 1), "fewer system.volume_channels")
        self.system, self.grid, self.geometry = system, grid, geometry
        self.views = [geometry.view(name) for name in system.views]
        embedding = 4 * system.image_channels[0]
        self.pose_embedding = nn.Sequential(
            nn.Linear(POSE_VALUES, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )
        self.image_unet = ResidualUNet(2, 3, system.image_channels, system.blocks, embedding)
        self.lift_proj = nn.ModuleList(
            nn.Conv2d(*channels, 1) for channels in zip(system.image_channels, system.lifted_channels, strict=True)
        )
        width = system.image_channels[0]
        self.residual_net = nn.Sequential(
            nn.Conv2d(3 + width, width, 3, padding=1),
            group_norm(width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            group_norm(width),
            nn.SiLU(),
            nn.Conv2d(width, system.residual_channels, 3, padding=1),
        )
        # The iteration's embedding is as wide as the pose's.
        self.iteration_embedding = nn.Embedding(system.iterations, embedding)
        # Volume, back-projected residual, its features, coordinates.
        inputs = 2 + system.residual_channels + 3
        self.volume_unet = ResidualUNet(
            3, inputs, system.volume_channels, system.blocks, embedding, system.lifted_channels
        )
        finest = system.volume_channels[0]
        last = nn.Conv3d(finest, 1, 3, padding=1)
        nn.init.zeros_(last.weight)
        self.conv_out = nn.Sequential(group_norm(finest), nn.SiLU(), last)

    def volumes(self, radiographs: Float[Tensor, "n views rows columns"]) -> list[Float[Tensor, "n 1 d h w"]]:
        """The reconstruction, then the earlier iterations' volumes, the last first, for deep supervision."""
        n, views, *_ = radiographs.shape
        radiographs = at_size(radiographs, self.grid.size).float()
        pixels = torch.linspace(-1, 1, self.grid.size, device=radiographs.device)
        coordinates = torch.stack(torch.meshgrid(pixels, pixels, indexing="ij"))
        images = torch.cat([radiographs.flatten(0, 1).unsqueeze(1), coordinates.expand(n * views, -1, -1, -1)], dim=1)
        features = self.image_unet(images, self._poses(radiographs).repeat(n, 1))
        lifted = [
            self._backproject(project_2d(maps), n) for project_2d, maps in zip(self.lift_proj, features, strict=True)
        ]
        position = torch.stack(torch.meshgrid(pixels, pixels, pixels, indexing="ij")).expand(n, -1, -1, -1, -1)

        volume = radiographs.new_zeros(n, 1, *self.grid.shape)
        correction = radiographs.new_zeros(n, 1 + self.system.residual_channels, *self.grid.shape)
        predictions: list[Tensor] = []
        for iteration in range(self.system.iterations):
            if iteration:
                correction = self._residual(volume, radiographs, features[0])
            embedding = self.iteration_embedding.weight[iteration].expand(n, -1)
            inputs = torch.cat([volume, correction, position], dim=1)
            volume = volume + self.conv_out(self.volume_unet(inputs, embedding, lifted)[0]).float()
            predictions.append(volume)
        predictions.reverse()
        return predictions if torch.is_grad_enabled() else predictions[:1]

    def _poses(self, like: Tensor) -> Float[Tensor, "views e"]:
        values = like.new_tensor([_pose(view, self.geometry, self.grid) for view in self.views])
        embedding: Tensor = self.pose_embedding(values)
        return embedding

    def _backproject(self, maps: Float[Tensor, "nv c s s"], n: int) -> Float[Tensor, "n c s s s"]:
        """The mean over the views of the maps, along the rays, in a cube as fine as the maps."""
        size = maps.shape[-1]
        by_view = maps.reshape(n, len(self.views), *maps.shape[1:])
        # Positions need more than bf16 has.
        with torch.autocast(maps.device.type, enabled=False):
            volumes = [
                backproject(by_view[:, k].float(), (size,) * 3, self.grid.extent_mm / size, self.geometry, view)
                for k, view in enumerate(self.views)
            ]
        return torch.stack(volumes).mean(dim=0).to(maps.dtype)

    def _residual(
        self,
        volume: Float[Tensor, "n 1 d h w"],
        radiographs: Float[Tensor, "n views s s"],
        features: Float[Tensor, "nv c s s"],
    ) -> Float[Tensor, "n out d h w"]:
        """The residual of the volume's matched projections, and features of it, back-projected."""
        n = len(volume)
        with torch.autocast(volume.device.type, enabled=False):
            window = self.system.window
            attenuation = hu_to_attenuation(volume.float() * window.width_hu + window.low_hu, self.geometry.attenuation)
            projections = torch.cat(
                [project(attenuation, self.grid.spacing_mm, self.geometry, view) for view in self.views], dim=1
            )
            with torch.no_grad():
                gain, offset, mask = fit_gain_and_offset(projections, radiographs)
            matched = gain * projections + offset
            residual = mask * (radiographs - matched)
        images = torch.stack([residual, matched, radiographs], dim=2).flatten(0, 1)
        predicted = self.residual_net(torch.cat([images.to(features.dtype), features], dim=1))
        return self._backproject(torch.cat([images[:, :1].to(predicted.dtype), predicted], dim=1), n)


def _pose(view: View, geometry: Geometry, grid: Grid) -> list[float]:
    """The pose of a view as 11 values of about 1 or less: axes, offset, inverse source distance and pixel size."""
    column, _, ray = view.axes()
    source = grid.extent_mm / geometry.source_isocenter_mm if geometry.beam == "cone" else 0.0
    offset = [2 * value / grid.extent_mm for value in view.offset_mm]
    pitch = grid.extent_mm * geometry.magnification / (geometry.detector_px * geometry.detector_pitch_mm)
    return [*column.tolist(), *ray.tolist(), *offset, source, pitch]


FULL = Unrolled(
    iterations=3,
    image_channels=(24, 48, 96, 128),
    lifted_channels=(16, 32, 48, 64),
    volume_channels=(16, 48, 96, 128),
    residual_channels=8,
    blocks=1,
)
SLIM = replace(
    FULL,
    iterations=2,
    image_channels=(16, 24, 32, 48),
    lifted_channels=(4, 8, 16, 24),
    volume_channels=(4, 16, 32, 48),
    ema_decay=0.99,
)
TINY = replace(SLIM, image_channels=(8, 16), lifted_channels=(8, 8), volume_channels=(8, 16))

UNROLLED = SystemEntry(
    title="unrolled",
    summary="back-projected features, data consistency and a 3-D U-Net in turn",
    paper="none: raylift's own",
    year=None,
    views="any",
    kind="regression",
    full=FULL,
    slim=SLIM,
    tiny=TINY,
    training=Training(
        size=64,
        steps=20_000,
        batch_size=16,
        lr=1e-3,
        betas=(0.9, 0.99),
        weight_decay=1e-4,
        gradient_clipping=1.0,
        decay_start=0.0,
        precision="bf16",
    ),
    slim_training=replace(SLIM_TRAINING, betas=(0.9, 0.99), gradient_clipping=1.0),
    tiny_training=replace(TINY_TRAINING, betas=(0.9, 0.99), gradient_clipping=1.0),
    spacing_mm=5.0,
)
