"""DeepSpeed engines, one for each network of an objective, and Adam's state independent of engine and ZeRO stage.

DeepSpeed's own checkpoints can be read only by the ZeRO stage and world size that wrote them. Here weights and Adam's
moments are gathered and restored by parameter name, so a run may resume with another stage, another number of workers,
or without DeepSpeed.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from raylift.models.objectives.objective import LossModule, Objective
from raylift.platform.config import RunConfig
from raylift.platform.training.checkpoint import NamedTensors

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP_KEY = "step"


class Engine:
    """A network under DeepSpeed, with an exponential moving average (EMA) of its weights if `ema_decay` is not 0."""

    def __init__(self, loss_module: LossModule, run: RunConfig, device: torch.device, ema_decay: float = 0.0) -> None:
        import deepspeed

        self.loss_module = loss_module
        self._trained = {name: p for name, p in loss_module.network.named_parameters() if p.requires_grad}
        optimizer = torch.optim.Adam(
            self._trained.values(),
            lr=run.optimizer.lr,
            betas=run.optimizer.betas,
            eps=run.optimizer.eps,
            weight_decay=run.optimizer.weight_decay,
        )
        with _quiet():
            self.deepspeed, *_ = deepspeed.initialize(
                model=loss_module.to(device), optimizer=optimizer, config=_deepspeed_config(run)
            )
        self._stage = run.engine.zero_stage
        self._ema = ExponentialMovingAverage(self._local_parameters, ema_decay) if ema_decay else None

    @property
    def has_ema(self) -> bool:
        """Whether an EMA of the weights is kept."""
        return self._ema is not None

    def update_ema(self, step: int) -> None:
        """Update the EMA, if one is kept; `step` is the number of optimizer steps before this one."""
        if self._ema is not None:
            self._ema.update(step)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within this context the network has its EMA weights, or its own where no EMA is kept."""
        if self._ema is None:
            yield
            return
        self._ema.swap()
        self._refresh_persistent_parameters()
        try:
            yield
        finally:
            self._ema.swap()
            self._refresh_persistent_parameters()

    def sync_batch_norm(self) -> None:
        """Replace the running statistics of batch norm on every rank by their mean over all ranks.

        Ranks differ because each processes its own samples. The update of running statistics is linear, so averaging
        at additional steps does not change later means.
        """
        for module in self.loss_module.network.modules():
            if isinstance(module, nn.BatchNorm2d) and module.training:
                for name in ("running_mean", "running_var"):
                    statistic = module.get_buffer(name)
                    torch.distributed.all_reduce(statistic)
                    statistic /= torch.distributed.get_world_size()

    def restore_ema(self, state: NamedTensors) -> None:
        """Restore the EMA of the weights, saved under any ZeRO stage and world size."""
        assert self._ema is not None
        for shadow, (name, parameter) in zip(self._ema.shadow, self._trained.items(), strict=True):
            value = state[name].to(shadow.device)
            shadow.copy_(self._local_partition(parameter, value) if self._stage == 3 else value)

    def _local_parameters(self) -> list[Tensor]:
        """The trainable parameters in fp32, as this rank holds them: whole, or the local partition under ZeRO-3."""
        trained = self._trained.values()
        return [p.ds_tensor if self._stage == 3 else p.data for p in trained]  # type: ignore[attr-defined]

    def _refresh_persistent_parameters(self) -> None:
        """Update the small parameters that ZeRO-3 keeps whole on every rank from their partitions."""
        whole = self.deepspeed.optimizer.persistent_parameters if self._stage == 3 else []
        if whole:
            whole[0].partition(whole)
            whole[0].all_gather(whole)

    def step(self, loss: Tensor) -> Tensor | float | None:
        """Backward and, at the last micro-batch, the optimizer step.

        Returns:
            At the last micro-batch the L2 norm of the gradient of the global batch before clipping, else None.
        """
        self.deepspeed.backward(loss)
        last: bool = self.deepspeed.is_gradient_accumulation_boundary()
        norm: Tensor | float | None = None
        if last and self._stage == 0:
            norm = nn.utils.get_total_norm([p.grad for p in self._trained.values() if p.grad is not None])
        self.deepspeed.step()
        if last and self._stage:
            norm = self.deepspeed.get_global_grad_norm()
        return norm

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr

    def weights(self) -> NamedTensors:
        """The network's weights in fp32 on the CPU, by name. Every rank must call it; only rank 0 gets them."""
        import deepspeed

        state: NamedTensors = {}
        for name, parameter in self.loss_module.network.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
                if _rank() == 0:
                    state[name] = parameter.detach().float().cpu().clone()
        if _rank() == 0:
            state |= {name: buffer.detach().cpu().clone() for name, buffer in self.loss_module.network.named_buffers()}
        return state

    def adam(self) -> NamedTensors:
        """Adam's moments and step by `<parameter>/<moment>`. Every rank must call it; only rank 0 gets them."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state: NamedTensors = {}
        inner = self._inner_optimizer()
        for name, parameter in self._trained.items():
            for moment in MOMENTS:
                if self._stage == 0:
                    value = inner.state[parameter].get(moment) if parameter in inner.state else None
                else:
                    value = safe_get_full_optimizer_state(parameter, moment)
                if _rank() == 0 and value is not None:
                    state[f"{name}/{moment}"] = value.detach().float().cpu().reshape(parameter_shape(parameter)).clone()
        if _rank() == 0:
            state[STEP_KEY] = next(iter(inner.state.values()))[STEP_KEY].detach().cpu().clone()
        return state

    def restore_adam(self, state: NamedTensors) -> None:
        """Restore Adam's moments, saved under any ZeRO stage and world size."""
        inner = self._inner_optimizer()
        for tensor in self._owned_tensors():
            inner.state[tensor] = {
                STEP_KEY: state[STEP_KEY].clone(),
                **{moment: torch.zeros_like(tensor, dtype=torch.float32) for moment in MOMENTS},
            }
        if self._stage in (1, 2):
            self.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._trained.items():
            for moment in MOMENTS:
                value = state.get(f"{name}/{moment}")
                if value is not None:
                    self._set_moment(parameter, moment, value)

    def _set_moment(self, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        value = value.to(parameter.device)
        if self._stage == 0:
            self._inner_optimizer().state[parameter][moment].copy_(value)
        elif self._stage in (1, 2):
            safe_set_full_optimizer_state(parameter, value, moment)
        else:
            # DeepSpeed's setter of full tensors leaves out the padding.
            safe_set_local_optimizer_state(parameter, self._local_partition(parameter, value), moment)

    def _local_partition(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's partition under ZeRO-3: an equal part of the flattened value, zero-padded at the end."""
        length = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        flat = torch.zeros(length * torch.distributed.get_world_size(), device=value.device)
        flat[: value.numel()] = value.flatten()
        return flat.narrow(0, length * _rank(), length)

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        outer = self.deepspeed.optimizer
        inner: torch.optim.Optimizer = outer.optimizer if self._stage else outer
        return inner

    def _owned_tensors(self) -> list[Tensor]:
        """The tensors that Adam updates: parameters at stage 0, this rank's flat partitions at the others."""
        if self._stage == 0:
            return list(self._trained.values())
        optimizer = self.deepspeed.optimizer
        if self._stage in (1, 2):
            return list(optimizer.single_partition_of_fp32_groups)
        return list(optimizer.fp32_partitioned_groups_flat)


class ExponentialMovingAverage:
    """An exponential moving average of tensors that are updated in place.

    The decay of step n is min(decay, (1 + n) / (10 + n)), since a fixed decay would retain the random initialization
    for long. It depends on the step alone, so the averages are the whole state.
    """

    def __init__(self, tensors: Callable[[], list[Tensor]], decay: float) -> None:
        self._tensors, self._decay = tensors, decay
        self.shadow = [tensor.detach().clone() for tensor in tensors()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the tensors by one step."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for shadow, tensor in zip(self.shadow, self._tensors(), strict=True):
            shadow.lerp_(tensor, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages and the tensors."""
        for shadow, tensor in zip(self.shadow, self._tensors(), strict=True):
            own = tensor.clone()
            tensor.copy_(shadow)
            shadow.copy_(own)


def init_backend(gpu: bool) -> torch.device:
    """Initialize DeepSpeed in a process that has a torch process group, and return the device to use."""
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if not gpu:
        # Compiling the shared-memory collective takes minutes, and a killed build leaves a lock for which every later
        # worker waits without end.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with _quiet():
        deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", auto_mpi_discovery=False)
    return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")


def initialize(objective: Objective, run: RunConfig, device: torch.device) -> dict[str, Engine]:
    """An engine for every network, in the order of their steps."""
    decays = [objective.ema_decay, *[0.0] * (len(objective.loss_modules) - 1)]
    return {
        name: Engine(loss_module, run, device, decay)
        for (name, loss_module), decay in zip(objective.loss_modules.items(), decays, strict=True)
    }


def parameter_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter, also where ZeRO-3 holds only a partition."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _deepspeed_config(run: RunConfig) -> dict[str, Any]:
    share = run.cluster.workers * run.engine.gradient_accumulation_steps
    return {
        "train_micro_batch_size_per_gpu": run.train.batch_size // share,
        "gradient_accumulation_steps": run.engine.gradient_accumulation_steps,
        # DeepSpeed's default clips at 1.0.
        "gradient_clipping": run.engine.gradient_clipping,
        "zero_optimization": {"stage": run.engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": run.engine.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 10**9,
    }


def _rank() -> int:
    return torch.distributed.get_rank()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings that DeepSpeed's calls of deprecated torch functions cause."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield
