"""Training: one loop for whatever objective, run by every worker of a Ray Train group."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor

from raylift import __version__
from raylift.datasets.archive import Archive
from raylift.datasets.errors import ConfigError, RayliftError
from raylift.datasets.order import SampleOrder, Share
from raylift.datasets.plain import from_plain, to_plain
from raylift.datasets.stream import Batch, Cache, Stream
from raylift.models.objectives.turns import Objective, frozen
from raylift.models.weights import Description
from raylift.platform import engine as engines
from raylift.platform import pretrained
from raylift.platform.checkpoint import (
    BEST_METRIC,
    Checkpoints,
    State,
    Tensors,
    load_adam,
    load_model,
    load_network,
    load_state,
    local_copy,
)
from raylift.platform.config import RunConfig
from raylift.platform.engine import Engine
from raylift.platform.tracking import Averages, Reporter, TensorBoard
from raylift.platform.validation import Validation


class NonFiniteLoss(RayliftError, ArithmeticError):
    """A loss that is NaN or infinite on some worker, found before any worker stepped."""


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs. Returns the last metrics, or the message of a NonFiniteLoss, which no retry can cure."""
    run = from_plain(RunConfig, settings["config"], "run")
    reporter = Reporter(settings.get("board"), run.train.steps, to_tune=settings.get("to_tune", False))
    try:
        return {"metrics": train(run, settings["run_url"], reporter)}
    except NonFiniteLoss as error:
        return {"non_finite": str(error)}


def train(run: RunConfig, run_url: str, reporter: Reporter) -> dict[str, float]:
    """Train to `run.train.steps`, from the newest verified checkpoint where there is one. Returns the last metrics."""
    torch.set_num_threads(run.cluster.threads_per_worker)
    rank, world = dist.get_rank(), dist.get_world_size()
    device = engines.prepare(gpu=run.cluster.gpus_per_worker > 0)
    archive = Archive(run.data.archive)
    description = describe(run, archive)
    checkpoints = Checkpoints(run_url)

    torch.manual_seed(run.train.seed)
    objective = run.system.objective(description.grid, description.geometry)
    resume_from = agree(checkpoints.newest() if rank == 0 else None)
    state, objective_engines = restore(resume_from, objective, run, device, reporter)
    reconstructing = next(iter(objective_engines.values()))
    stream = open_stream(archive, run, Share(rank, world, run.train.batch, run.engine.gradient_accumulation), state)
    validation = Validation(archive, run, description, rank, world, device)
    board = TensorBoard(run_url, state.history) if rank == 0 else None
    averages, history, metrics = Averages(), list(state.history), dict(state.metrics)

    batches = iter(stream)
    for step in range(state.step, run.train.steps):
        started = time.perf_counter()
        # Dropout depends on (seed, step, rank) alone, so a resumed run draws what the uninterrupted one would have.
        torch.manual_seed(int(np.random.SeedSequence([run.train.seed, step, rank]).generate_state(1, np.uint64)[0]))
        for engine in objective_engines.values():
            engine.set_rate(run.optimiser.rate_at(step, run.train.steps))
        micro_batches = next(batches)
        waited = time.perf_counter() - started
        for batch in micro_batches:
            take_turns(objective_engines, batch.to(device), step, averages)
        for engine in objective_engines.values():
            engine.average(step)
        averages.add("seconds_a_step", time.perf_counter() - started)
        averages.add("seconds_waiting_for_data", waited)

        done = step + 1
        if done % run.train.log_every == 0 or done == run.train.steps:
            entry = {"step": float(done), "rate": run.optimiser.rate_at(step, run.train.steps), **averages.take()}
            history.append(entry)
            reporter.log(done, entry)
            if board:
                board.scalars(entry)
        if done % run.train.validate_every == 0 or done == run.train.steps:
            with reconstructing.averaged():
                metrics, picture = validation.run(objective.reconstructor)
            history.append({"step": float(done), **metrics})
            tensors = gather(objective_engines)
            if board:
                written = State(done, stream.samples_taken, metrics, history, to_plain(run), run.sha256())
                here = replace(description, provenance={**description.provenance, "step": done})
                checkpoints.save(written, tensors, here)
                checkpoints.prune(run.train.keep_checkpoints, BEST_METRIC)
                board.validation(done, metrics, picture)
            dist.barrier()
            reporter.validated(done, metrics)
    if board:
        board.close()
    return metrics


def take_turns(objective_engines: dict[str, Engine], batch: Batch, step: int, averages: Averages) -> None:
    """Each player's forward, backward and step on one micro-batch, the other players frozen meanwhile."""
    carried: dict[str, Tensor] = {}
    for name, engine in objective_engines.items():
        others = [other.player.network for other in objective_engines.values() if other is not engine]
        with frozen(others):
            loss, logs, kept = engine.deepspeed(batch, carried)
            require_finite(loss, name, batch, step)
            engine.deepspeed.backward(loss)
            engine.deepspeed.step()
        carried |= kept
        averages.add(f"{name}/loss", loss.detach())
        for key, value in logs.items():
            averages.add(f"{name}/{key}", value)


def require_finite(loss: Tensor, player: str, batch: Batch, step: int) -> None:
    """Stop every rank if the loss of any is not finite, before anyone has stepped.

    Raises:
        NonFiniteLoss: on all ranks, naming the samples at fault.
    """
    finite = torch.isfinite(loss.detach())
    flag = (~finite).float().reshape(1)
    dist.all_reduce(flag, op=dist.ReduceOp.SUM)
    if flag.item() == 0:
        return
    at_fault: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(at_fault, None if finite else (float(loss.detach()), batch.ids))
    named = "; ".join(f"{value} on samples {', '.join(ids)}" for value, ids in filter(None, at_fault))
    raise NonFiniteLoss(
        f"the {player}'s loss at step {step} is {named}: look at these samples, or lower optimiser.rate. "
        "No worker stepped; the last checkpoint is sound"
    )


def restore(
    url: str | None, objective: Objective, run: RunConfig, device: torch.device, reporter: Reporter
) -> tuple[State, dict[str, Engine]]:
    """Engines for all players, from a checkpoint or fresh, and the state to begin with."""
    if url is None:
        pretrained.fill(objective.reconstructor, run.system)
        return State(step=0, samples_taken=0, metrics={}), engines.start(objective, run, device)
    with local_copy(url) as local:
        state = load_state(local)
        # Weights go in before DeepSpeed takes the parameters apart, Adam's moments after.
        for index, (name, network) in enumerate(objective.networks().items()):
            network.load_state_dict(load_network(local, name, first=index == 0))
        started = engines.start(objective, run, device)
        for name, engine in started.items():
            engine.restore_adam(load_adam(local, name))
            if engine.has_average:
                engine.restore_average(load_model(local))
    reporter.note(f"resumed from {url} at step {state.step}")
    return state, started


def gather(objective_engines: dict[str, Engine]) -> Tensors:
    """All players' weights and moments, and averaged weights; every rank must call it, only rank 0 gets them."""
    averaged = {}
    for name, engine in objective_engines.items():
        if engine.has_average:
            with engine.averaged():
                averaged[name] = engine.weights()
    return Tensors(
        {name: engine.weights() for name, engine in objective_engines.items()},
        {name: engine.adam() for name, engine in objective_engines.items()},
        averaged,
    )


def agree(newest: tuple[str | None, list[str]] | None) -> str | None:
    """Rank 0's choice of checkpoint, on every rank; what it passed over is printed."""
    chosen: list[Any] = [newest]
    dist.broadcast_object_list(chosen, src=0)
    url, passed_over = chosen[0]
    if dist.get_rank() == 0:
        for reason in passed_over:
            print(f"raylift: checkpoint passed over: {reason}", flush=True)
    return None if url is None else str(url)


def open_stream(archive: Archive, run: RunConfig, share: Share, state: State) -> Stream:
    """This worker's stream, at the position the state says."""
    entries = archive.entries("train")
    stream = Stream(
        Cache(archive, int(run.data.cache_gib * 2**30)),
        entries,
        SampleOrder(len(entries), run.train.seed),
        share,
        run.data.window,
        views=view_indices(archive, run),
        labels=run.system.needs_labels,
        threads=run.data.threads,
        batches_ahead=run.data.batches_ahead,
    )
    stream.samples_taken = state.samples_taken
    return stream


def view_indices(archive: Archive, run: RunConfig) -> list[int]:
    """Where the system's views stand among the archive's."""
    names = [view.name for view in archive.manifest.geometry.views]
    missing = [view for view in run.system.views if view not in names]
    if missing:
        raise ConfigError(f"{archive.url} has the views {', '.join(names)}, not {', '.join(missing)}")
    return [names.index(view) for view in run.system.views]


def describe(run: RunConfig, archive: Archive) -> Description:
    """What the trained network is for, as it will stand beside its weights."""
    import deepspeed

    geometry = archive.manifest.geometry
    chosen = tuple(geometry.views[index] for index in view_indices(archive, run))
    versions = {"raylift": __version__, "torch": torch.__version__, "ray": ray.__version__}
    return Description(
        system=run.system,
        grid=archive.manifest.grid,
        geometry=replace(geometry, views=chosen),
        window=run.data.window,
        provenance={
            "archive": archive.url,
            "archive_generation": archive.manifest.generation,
            "training_samples": [entry.id for entry in archive.entries("train")],
            "config": to_plain(run),
            "config_sha256": run.sha256(),
            "versions": {**versions, "deepspeed": deepspeed.__version__},
        },
    )


def check(run: RunConfig) -> Archive:
    """Everything about a run that can be known before it starts.

    Raises:
        ConfigError: the archive does not fit the run, or has nothing to train or validate on.
    """
    archive = Archive(run.data.archive)
    grid = archive.manifest.grid
    if grid.size != run.data.size:
        raise ConfigError(
            f"{archive.url} holds volumes of {grid.size} voxels a side, the run wants {run.data.size}: "
            f"pass --data.size {grid.size} or use another archive"
        )
    view_indices(archive, run)
    for split in ("train", "val"):
        if not archive.entries(split):
            raise ConfigError(f"{archive.url} has no sample in the {split} split: ingest more subjects")
    return archive
