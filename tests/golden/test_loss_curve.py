"""The loss curve of a fixed small run, to detect changes of the computation.

`python tests/golden/test_loss_curve.py` rewrites the curve; do that only for an intended change.
"""

import json
from pathlib import Path

import pytest
import torch

from raylift.datasets.batch import Batch
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.intensity import Window, standardize
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import render_drrs
from raylift.models.objectives.objective import frozen
from raylift.platform.presets import PRESETS

CURVE = Path(__file__).with_name("x2ct_gan_tiny.json")
STEPS = 8


def curve() -> dict[str, list[float]]:
    """Losses of both players over a few steps of Adam on two phantoms, on one thread, without dropout."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    grid = Grid(32, 10.0)
    volumes = [thorax(seed, grid)[0] for seed in (1, 2)]
    views = [
        torch.stack([torch.from_numpy(standardize(r)) for r in render_drrs(v, grid, chest(grid))]) for v in volumes
    ]
    unit = [Window().to_unit(torch.from_numpy(volume.astype("float32")))[None] for volume in volumes]
    batch = Batch(torch.stack(unit), torch.stack(views))
    run = PRESETS["x2ct-gan-tiny"]
    objective = run.system.objective(grid, chest(grid))
    for module in objective.reconstructor.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    optimizers = {
        name: torch.optim.Adam(net.parameters(), lr=run.optimizer.lr, betas=(0.5, 0.99))
        for name, net in objective.networks().items()
    }
    losses = {name: [] for name in objective.players}
    for _ in range(STEPS):
        carried = {}
        for name, player in objective.players.items():
            optimizers[name].zero_grad()
            with frozen([net for other, net in objective.networks().items() if other != name]):
                loss, _, kept = player(batch, carried)
                loss.backward()
            optimizers[name].step()
            carried |= kept
            losses[name].append(round(float(loss.detach()), 6))
    return losses


def test_the_loss_curve_is_the_one_on_record():
    recorded, now = json.loads(CURVE.read_text()), curve()
    for name, values in recorded.items():
        # Rounding differs between processors; a changed computation differs more.
        assert now[name] == pytest.approx(values, rel=0.03), name
    assert recorded["generator"][-1] < 0.5 * recorded["generator"][0]


if __name__ == "__main__":
    CURVE.write_text(json.dumps(curve(), indent=1) + "\n")
