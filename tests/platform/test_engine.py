"""Two networks on DeepSpeed equal plain torch on every ZeRO stage, and resume from each other's checkpoints."""

from dataclasses import replace

import pytest
import torch
from processes import run_ranks
from torch import nn

from raylift.datasets.batch import Batch
from raylift.models.objectives.adversarial import reconstruction_objective
from raylift.models.objectives.objective import Objective, frozen
from raylift.models.parts.rays import repeat_along_axis
from raylift.models.volume_network import VolumeNetwork
from raylift.platform.config import EngineConfig, OptimizerConfig, RunConfig
from raylift.platform.presets import PRESETS
from raylift.platform.training import engine as engines
from raylift.platform.training.loop import gather_tensors, training_step
from raylift.platform.training.tracking import RunningMeans

WORLD, ACCUMULATION, STEPS, SIZE = 2, 2, 3, 8
TINY = PRESETS["x2ct-gan-tiny"]


class SmoothGenerator(VolumeNetwork):
    """Small and smooth: instance norms of tiny volumes would amplify rounding errors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(2, 5, 3, padding=1), nn.Tanh(), nn.Conv3d(5, 1, 3, padding=1))
        self.never_used = nn.Linear(3, 1)

    def volumes(self, radiographs: torch.Tensor) -> list[torch.Tensor]:
        lifted = [repeat_along_axis(radiographs[:, k : k + 1], axis) for k, axis in enumerate((3, 4))]
        return [self.layers(torch.cat(lifted, dim=1))]


class SmoothDiscriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(2, 3, 3), nn.Tanh(), nn.Conv3d(3, 1, 3))

    def forward(self, volume: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([volume, repeat_along_axis(views[:, :1], 3)], dim=1))


def settings(stage: int, precision: str = "fp32", workers: int = WORLD, clip: float = 0.0) -> RunConfig:
    return replace(
        TINY,
        engine=EngineConfig(stage, precision, ACCUMULATION, clip),
        cluster=replace(TINY.cluster, workers=workers),
        optimizer=OptimizerConfig(lr=1e-2),
        train=replace(TINY.train, batch_size=4),
    )


def micro_batch(step: int, index: int) -> Batch:
    """The step's global batch has four samples; micro-batch `index` is one of them."""
    generator = torch.Generator().manual_seed(100 * step + index)
    return Batch(
        torch.rand(1, 1, SIZE, SIZE, SIZE, generator=generator),
        torch.rand(1, 2, SIZE, SIZE, generator=generator),
        (f"{step}/{index}",),
    )


def fresh_objective(run: RunConfig) -> Objective:
    torch.manual_seed(5)
    return reconstruction_objective(SmoothGenerator(), SmoothDiscriminator(), run.system.loss)


def train_steps(objective_engines, run, rank, world, begin, end):
    per_rank = 4 // world // ACCUMULATION
    for step in range(begin, end):
        for engine in objective_engines.values():
            engine.set_lr(run.optimizer.lr_at(step, 100))
        for micro in range(ACCUMULATION):
            first = micro * world * per_rank + rank * per_rank
            parts = [micro_batch(step, first + k) for k in range(per_rank)]
            batch = Batch(torch.cat([p.volume for p in parts]), torch.cat([p.radiographs for p in parts]), ("x",))
            values = training_step(objective_engines, batch, step, RunningMeans())
    return values


def reference(run: RunConfig, steps: int) -> dict[str, dict[str, torch.Tensor]]:
    """One process, torch's own Adam, mean gradients over the global batch, every network on each micro-batch."""
    objective = fresh_objective(run)
    optimizers = {
        name: torch.optim.Adam(loss_module.network.parameters(), lr=1e-2, betas=(0.5, 0.99))
        for name, loss_module in objective.loss_modules.items()
    }
    for step in range(steps):
        for optimizer in optimizers.values():
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = run.optimizer.lr_at(step, 100)
        for micro in range(ACCUMULATION):
            earlier = [{} for _ in range(WORLD)]
            for name, loss_module in objective.loss_modules.items():
                others = [net for other, net in objective.networks().items() if other != name]
                for rank in range(WORLD):
                    with frozen(others):
                        loss, _, outputs = loss_module(micro_batch(step, micro * WORLD + rank), earlier[rank])
                        (loss / (WORLD * ACCUMULATION)).backward()
                    earlier[rank] |= outputs
                if micro == ACCUMULATION - 1:
                    optimizers[name].step()
    return {name: dict(network.named_parameters()) for name, network in objective.networks().items()}


@pytest.fixture(scope="module")
def trained() -> dict:
    """All runs of two ranks, in one pair of processes: their start costs far more than the steps."""
    wanted = {("fp32", stage): (settings(stage), STEPS) for stage in range(4)}
    wanted |= {("half", stage): (settings(stage), 2) for stage in range(4)}
    wanted |= {("bf16", stage): (settings(stage, "bf16"), STEPS) for stage in (0, 3)}
    wanted |= {("one step", clip): (settings(1, clip=clip), 1) for clip in (0.0, 1e-3)}
    return run_ranks(WORLD, on_deepspeed, wanted)[0]


def on_deepspeed(rank, wanted):
    device = engines.init_backend(gpu=False)
    results = {}
    for key, (run, steps) in wanted.items():
        started = engines.initialize(fresh_objective(run), run, device)
        results["norms", *key] = train_steps(started, run, rank, WORLD, 0, steps)
        results[key] = gather_tensors(started)
    return results


def largest_difference(tensors, expected):
    return max(
        float((tensors.networks[network][name] - parameter.detach()).abs().max())
        for network, parameters in expected.items()
        for name, parameter in parameters.items()
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_networks_with_accumulation_match_plain_torch(trained, stage):
    run = settings(stage)
    assert largest_difference(trained["fp32", stage], reference(run, STEPS)) < 1e-6
    # What one step more or less would be.
    assert largest_difference(trained["fp32", stage], reference(run, STEPS - 1)) > 1e-4


@pytest.mark.parametrize("stage", [0, 3])
def test_bf16_follows_fp32_with_weights_kept_in_fp32(trained, stage):
    tensors = trained["bf16", stage]
    expected, begin = reference(settings(stage), STEPS), reference(settings(stage), 0)
    for network, parameters in expected.items():
        wanted = torch.cat([(p - begin[network][name]).detach().flatten() for name, p in parameters.items()])
        taken = torch.cat([(tensors.networks[network][n] - begin[network][n]).detach().flatten() for n in parameters])
        assert torch.cosine_similarity(wanted, taken, dim=0) > 0.95
        assert not torch.equal(wanted, taken)
        # Values that bf16 could not hold.
        weight = next(iter(tensors.networks[network].values()))
        assert not torch.equal(weight, weight.bfloat16().float())


def test_clipping_limits_the_gradient(trained):
    def gradient_norm(tensors):
        # After one step the first moment is half the gradient, with beta 1 of 0.5.
        moments = [value for name, value in tensors.adam["generator"].items() if name.endswith("exp_avg")]
        return 2 * float(torch.stack([moment.norm() for moment in moments]).norm())

    assert gradient_norm(trained["one step", 0.0]) > 0.1
    assert gradient_norm(trained["one step", 1e-3]) == pytest.approx(1e-3, rel=0.01)


def test_the_gradient_norm_is_of_the_global_batch_before_clipping_on_every_stage(trained):
    moments = [value for name, value in trained["one step", 0.0].adam["generator"].items() if name.endswith("exp_avg")]
    expected = 2 * float(torch.stack([moment.norm() for moment in moments]).norm())
    for clip in (0.0, 1e-3):
        assert trained["norms", "one step", clip]["generator/grad_norm"] == pytest.approx(expected, rel=1e-4)
    for network in ("generator", "discriminator"):
        norms = [trained["norms", "fp32", stage][f"{network}/grad_norm"] for stage in range(4)]
        assert norms[0] > 0
        assert norms == pytest.approx(norms[:1] * 4, rel=1e-4)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_resumed_with_another_stage_and_world_size_equals_an_uninterrupted_one(trained, world):
    pairs = [(0, 3), (1, 2), (3, 1), (2, 0)]
    halves = {pair: trained["half", pair[0]] for pair in pairs}
    done = run_ranks(world, resume, halves, world)[0]
    expected = reference(settings(0), 4)
    for pair in pairs:
        assert largest_difference(done[pair], expected) < 1e-6, f"from stage {pair[0]} to {pair[1]}"


def resume(rank, halves, world):
    device = engines.init_backend(gpu=False)
    results = {}
    for (before, after), half in halves.items():
        run = settings(after, workers=world)
        objective = fresh_objective(run)
        for name, network in objective.networks().items():
            network.load_state_dict(half.networks[name])
        started = engines.initialize(objective, run, device)
        for name, engine in started.items():
            engine.restore_adam(half.adam[name])
        train_steps(started, run, rank, world, 2, 4)
        results[before, after] = gather_tensors(started)
    return results


class Normed(SmoothGenerator):
    """Running statistics, which are no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2)

    def volumes(self, radiographs: torch.Tensor) -> list[torch.Tensor]:
        return super().volumes(self.norm(radiographs))


def normed_steps(rank, shares):
    device = engines.init_backend(gpu=False)
    run = settings(1)
    run = replace(run, system=replace(run.system, loss=replace(run.system.loss, adversarial_weight=0.0)))
    results = []
    for after in shares:
        torch.manual_seed(5)
        started = engines.initialize(reconstruction_objective(Normed(), None, run.system.loss), run, device)
        for step in range(4):
            train_steps(started, run, rank, WORLD, step, step + 1)
            if step in after:
                started["generator"].sync_batch_norm()
        norm = started["generator"].loss_module.network.norm
        results.append((norm.running_mean.clone(), norm.running_var.clone(), gather_tensors(started)))
    return results


def test_every_rank_validates_and_saves_with_the_mean_of_all_running_statistics_at_any_interval():
    first, second = run_ranks(WORLD, normed_steps, [(3,), (1, 3), ()])
    for once, twice in zip(first[0][:2], first[1][:2], strict=True):
        torch.testing.assert_close(once, twice, atol=1e-7, rtol=1e-6)
    for own, other, shared in zip(first[2][:2], second[2][:2], first[0][:2], strict=True):
        assert (own - other).abs().max() > 1e-4
        torch.testing.assert_close((own + other) / 2, shared, atol=1e-6, rtol=1e-5)
    for shared, of_other in zip(first[0][:2], second[0][:2], strict=True):
        assert torch.equal(shared, of_other)
    assert torch.equal(first[0][2].networks["generator"]["norm.running_mean"], first[0][0])
