"""The training loop for every objective, run by each worker of a Ray Train group."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raylift.datasets.archive import store
from raylift.datasets.archive.archive import Archive
from raylift.datasets.batch import Batch
from raylift.datasets.errors import RayliftError
from raylift.datasets.serialization import from_plain, to_plain
from raylift.datasets.streaming.order import BatchPartition
from raylift.models.objectives.objective import Objective, frozen
from raylift.platform.config import RunConfig
from raylift.platform.training import engine as engines
from raylift.platform.training import initial_weights
from raylift.platform.training.checkpoint import (
    Checkpoints,
    Tensors,
    TrainingState,
    load_adam,
    load_model_weights,
    load_network,
    load_state,
    local_copy,
)
from raylift.platform.training.divergence import DIVERGED, DivergedLossError, DivergenceMonitor, diverged_at
from raylift.platform.training.engine import Engine
from raylift.platform.training.inputs import describe, notes, open_stream, require_archives, training_data
from raylift.platform.training.tracking import Reporter, RunningMeans, TensorBoard, peak_memory_gib
from raylift.platform.training.validation import Validation


class PreemptedError(RuntimeError):
    """The end of a group of workers, after a checkpoint, because one of their nodes will be preempted."""


class NonFiniteLossError(RayliftError, ArithmeticError):
    """A loss that is NaN or infinite on some worker, found before any worker stepped."""


def train_worker(settings: dict[str, Any]) -> dict[str, float]:
    """The training function of a Ray Train worker.

    Returns:
        The last metrics.
    """
    run = from_plain(RunConfig, settings["config"], "run")
    reporter = Reporter(settings.get("messages"), run.train.steps, to_tune=settings.get("to_tune", False))
    store.report_stall = reporter.warn
    return train(run, settings["run_url"], reporter, settings.get("archives"), settings.get("until", 0))


def train(
    run: RunConfig, run_url: str, reporter: Reporter, archives: dict[str, str] | None = None, until: int = 0
) -> dict[str, float]:
    """Train from the newest verified checkpoint, if any, until the last step or until the driver requests the end.

    Args:
        run: the configuration, the same on every rank.
        run_url: the run's folder.
        reporter: for lines to the terminal.
        archives: digests of the archives (`inputs.archive_digests`), with which every rank compares its own.
        until: the last step; 0: `run.train.steps`, which determines the learning rates of all steps in any case.

    Returns:
        The last metrics.
    """
    torch.set_num_threads(run.cluster.threads_per_worker)
    rank, world = dist.get_rank(), dist.get_world_size()
    device = engines.init_backend(gpu=run.cluster.gpus_per_worker > 0)
    require_archives(run, archives or {})
    archive = Archive(run.data.archive, run.data.snapshot)
    checkpoints = Checkpoints(run_url)
    resume_from = broadcast_checkpoint(checkpoints.newest() if rank == 0 else None, reporter)
    description = describe(run, archive, resume_from)
    data = training_data(archive, run, description, resume_from) if rank == 0 else None

    torch.manual_seed(run.train.seed)
    objective = run.system.objective(description.grid, description.geometry, run.data.window)
    remarks = notes(run, objective)
    for remark in remarks:
        reporter.note(remark)
    description = replace(description, provenance={**description.provenance, "notes": list(remarks)})
    state, objective_engines = restore(resume_from, objective, run, device, reporter)
    share = BatchPartition(rank, world, run.train.batch_size, run.engine.gradient_accumulation_steps)
    stream = open_stream(archive, run, description, share, state.samples_consumed, device)
    reconstructing = next(iter(objective_engines.values()))
    validation = Validation(archive, run, description, rank, world, device)
    writer = TensorBoard(run_url, state.history) if rank == 0 else None
    means, history, metrics = RunningMeans(), list(state.history), dict(state.metrics)
    divergence = DivergenceMonitor(run.train.divergence_factor, history)
    if metrics:
        reporter.report_to_tune(state.step, metrics)  # which may not have received it before the interruption

    batches, last = iter(stream), min(until or run.train.steps, run.train.steps)
    for step in range(state.step, last):
        started = time.perf_counter()
        # Dropout depends on (seed, step, rank) alone, so a resumed run equals an uninterrupted one.
        torch.manual_seed(int(np.random.SeedSequence([run.train.seed, step, rank]).generate_state(1, np.uint64)[0]))
        for engine in objective_engines.values():
            engine.set_lr(run.optimizer.lr_at(step, run.train.steps))
        micro_batches = next(batches)
        data_time = time.perf_counter() - started
        for batch in micro_batches:
            values = training_step(objective_engines, batch.to(device), step, means)
            if diverging := divergence.update(values):
                history.append({"step": float(step), DIVERGED: 1.0})
                handle_divergence(run, f"step {step}: {diverging}", checkpoints.newest_before(step), reporter)
        for engine in objective_engines.values():
            engine.update_ema(step)
        means.add("step_time_s", time.perf_counter() - started)
        means.add("data_time_s", data_time)

        done = step + 1
        stops, preempted = on_any_rank([reporter.stop_requested(), reporter.is_preempted()], device)
        if done % run.train.log_every == 0 or done == last:
            entry = {
                "step": float(done),
                "epoch": stream.epochs_consumed,
                "lr": run.optimizer.lr_at(step, run.train.steps),
                **means.reduce(),
                "peak_memory_gib": peak_memory_gib(device),
            }
            entry["samples_per_s"] = run.train.batch_size / entry["step_time_s"]
            history.append(entry)
            reporter.log(done, entry)
            if writer:
                writer.scalars(entry)
        validates = done % run.train.validate_every == 0 or done == last
        if not (validates or stops or preempted):
            continue
        for engine in objective_engines.values():
            engine.sync_batch_norm()
        measured: dict[str, float] = {}
        if validates:
            with reconstructing.ema_weights():
                measured, slices = validation.run(objective.reconstruction_network)
            metrics = measured
            history.append({"step": float(done), **metrics})
        tensors = gather_tensors(objective_engines)
        if writer:
            saved = TrainingState(done, stream.samples_consumed, measured, history, to_plain(run), run.sha256())
            at_step = replace(description, provenance={**description.provenance, "step": done})
            checkpoints.save(saved, tensors, at_step, data)
            checkpoints.prune(run.train.keep_checkpoints, diverged_at(history))
            if validates:
                writer.validation(done, metrics, slices)
        dist.barrier()
        if validates:
            reporter.validated(done, metrics)
        if stops:
            reporter.confirm_stop(done)
            break
        if preempted and done < last:
            raise PreemptedError
    if writer:
        writer.close()
    return metrics


def training_step(
    objective_engines: dict[str, Engine], batch: Batch, step: int, means: RunningMeans
) -> dict[str, float]:
    """Each network's forward, backward and optimizer step on one micro-batch, with the other networks frozen.

    A network is updated only every `LossModule.every` steps.

    Returns:
        The mean loss over all ranks and the gradient norm of each network that was updated, by name.
    """
    earlier: dict[str, Tensor] = {}
    values: dict[str, float] = {}
    for name, engine in objective_engines.items():
        if step % engine.loss_module.every:
            continue
        others = [other.loss_module.network for other in objective_engines.values() if other is not engine]
        with frozen(others):
            loss, logs, outputs = engine.deepspeed(batch, earlier)
            values[f"{name}/loss"] = require_finite(loss, name, batch, step)
            norm = engine.step(loss)
        earlier |= outputs
        means.add(f"{name}/loss", loss.detach())
        if norm is not None:
            values[f"{name}/grad_norm"] = float(norm)
            means.add(f"{name}/grad_norm", float(norm))
        for key, value in logs.items():
            means.add(f"{name}/{key}", value)
    return values


def on_any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    """Whether each flag is set on any rank, for all ranks."""
    counts = torch.tensor(flags, dtype=torch.float32, device=device)
    dist.all_reduce(counts)
    return [count > 0 for count in counts.tolist()]


def handle_divergence(run: RunConfig, divergence: str, checkpoint: str | None, reporter: Reporter) -> None:
    """Print a divergence and the checkpoint before it, or end the run.

    Raises:
        DivergedLossError: the run stops on divergence.
    """
    text = f"the training diverges at {divergence}: lower optimizer.lr or set engine.gradient_clipping"
    text += f"; {checkpoint} is kept" if checkpoint else ""
    if run.train.stop_on_divergence:
        raise DivergedLossError(text)
    reporter.note(text)


def require_finite(loss: Tensor, network: str, batch: Batch, step: int) -> float:
    """The mean loss over all ranks, before the optimizer steps.

    Raises:
        NonFiniteLossError: on all ranks, with the ids of the samples concerned.
    """
    finite = torch.isfinite(loss.detach())
    sums = torch.stack([(~finite).double(), loss.detach().double()])
    dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    failures, total = sums.tolist()
    if failures == 0:
        return float(total / dist.get_world_size())
    non_finite: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(non_finite, None if finite else (float(loss.detach()), batch.ids))
    named = "; ".join(f"{value} on samples {', '.join(ids)}" for value, ids in filter(None, non_finite))
    raise NonFiniteLossError(
        f"the {network}'s loss at step {step} is {named}: check these samples, or lower optimizer.lr. "
        "No worker was updated; the last checkpoint is valid"
    )


def restore(
    url: str | None, objective: Objective, run: RunConfig, device: torch.device, reporter: Reporter
) -> tuple[TrainingState, dict[str, Engine]]:
    """The engines of all networks and the training state, restored from a checkpoint or newly initialized."""
    if url is None:
        initial_weights.load_weights(objective.reconstruction_network, run)
        return TrainingState(step=0, samples_consumed=0, metrics={}), engines.initialize(objective, run, device)
    with local_copy(url) as local:
        state = load_state(local)
        # Weights are loaded before DeepSpeed partitions the parameters, Adam's moments after.
        for index, (name, network) in enumerate(objective.networks().items()):
            network.load_state_dict(load_network(local, name, first=index == 0))
        started = engines.initialize(objective, run, device)
        for name, engine in started.items():
            engine.restore_adam(load_adam(local, name))
            if engine.has_ema:
                engine.restore_ema(load_model_weights(local))
    reporter.note(f"resumed from {url} at step {state.step}")
    return state, started


def gather_tensors(objective_engines: dict[str, Engine]) -> Tensors:
    """Weights, Adam's moments and EMA weights of all networks; every rank must call it, only rank 0 gets them."""
    ema = {}
    for name, engine in objective_engines.items():
        if engine.has_ema:
            with engine.ema_weights():
                ema[name] = engine.weights()
    return Tensors(
        {name: engine.weights() for name, engine in objective_engines.items()},
        {name: engine.adam() for name, engine in objective_engines.items()},
        ema,
    )


def broadcast_checkpoint(newest: tuple[str | None, list[str]] | None, reporter: Reporter) -> str | None:
    """Rank 0's choice of checkpoint, on every rank; each newer one that it rejected is reported in a line."""
    chosen: list[Any] = [newest]
    dist.broadcast_object_list(chosen, src=0)
    url, rejected = chosen[0]
    for reason in rejected:
        reporter.note(f"{reason}: {url or 'the start of the run'} is used instead")
    return None if url is None else str(url)
