"""The only import of DeepSpeed: an engine that trains a module, and reads and writes its state."""

import atexit
import contextlib
import io
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)
from packaging.version import Version
from torch import Tensor, nn

from llm2clip_plugin.quiet import quiet_deepspeed
from llm2clip_plugin.train.config import DDP_TIMEOUT, OptimConfig
from llm2clip_plugin.train.distributed import (
    choose_device,
    join_ranks,
    rank,
    set_single_process_environment,
    timed,
    world_size,
)
from llm2clip_plugin.train.monitors import Monitors
from llm2clip_plugin.train.optim import (
    AdamW,
    FlatAdamW,
    Rates,
    as_one_group,
    chosen_optimizer,
    offloads_optimizer,
    zero_stage,
)

# read by the import below
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

ZERO_SUPPORTED_OPTIMIZERS.append(FlatAdamW)  # else a warning: it is "untested"
# leaves out all non-finite updates; waits for gathers that gloo ends in any order
OLDEST_DEEPSPEED = Version("0.19.8")
# values, or rows, of a master that are exchanged at once: 64 MiB of a flat one
EXCHANGED = 1 << 24
# of (name, value, dtype or that of the value): checkpoint.on_host on rank 0
Copy = Callable[..., Tensor]
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def start_ranks(timeout: float = DDP_TIMEOUT) -> torch.device:
    """Join the process group (of one process, without a launcher); returns this rank's device.
    timeout: of collectives, in this group and DeepSpeed's own. Raises as ``join_ranks``."""
    set_single_process_environment()
    prepare_deepspeed()
    # of groups made without one, as by DeepSpeed
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(dist.distributed_c10d, name, timedelta(seconds=timeout))
    device = choose_device()
    if not dist.is_initialized():
        join_ranks(device, timeout)
        # the group's threads could abort the process while the interpreter exits
        atexit.register(_destroy_group)
    deepspeed.init_distributed(timeout=timedelta(seconds=timeout))
    return device


def _destroy_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def prepare_deepspeed() -> None:
    """Keep DeepSpeed's informational log lines off the terminal, and its shared-memory extension,
    which only serves tensor-parallel inference on CPUs, from being compiled for a minute."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    quiet_deepspeed()


def check_deepspeed(config: dict[str, Any], where: str) -> None:
    """Let DeepSpeed read a completed configuration, before any model is loaded; ValueError if it
    refuses."""
    prepare_deepspeed()
    world = world_size()  # of a plan's ranks there may be none yet
    micro_batches = world * config["gradient_accumulation_steps"]
    batch = micro_batches * config["train_micro_batch_size_per_gpu"]
    try:
        deepspeed.DeepSpeedConfig({**config, "train_batch_size": batch})
    # DeepSpeed's own, pydantic's, or what its reader stumbles over
    except Exception as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{where}: DeepSpeed refuses it: {problem}") from error


def refuse_old_deepspeed() -> None:
    """Raise ValueError for a version whose ZeRO may update with NaN."""
    if Version(deepspeed.__version__) < OLDEST_DEEPSPEED:
        raise ValueError(
            f"deepspeed {deepspeed.__version__} may update with NaN; "
            f"use {OLDEST_DEEPSPEED} or newer"
        )


def started_engine(
    module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]
) -> Any:
    """DeepSpeed's engine, whose own optimizer is one of a dozen classes."""
    prepare_deepspeed()
    # BF16_Optimizer prints its memory, group by group
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config
        )
    return engine


class Engine:
    """A module, its optimizer and DeepSpeed's engine over both.

    One optimizer step is ``accumulation`` times forward, ``backward`` and ``step``. Gradients are
    summed over the micro-batches and averaged over the ranks.

    Weights and moments are read and written one parameter at a time, complete, in fp32 and under
    the module's own names, whatever the ZeRO stage, the precision and the number of ranks: a
    checkpoint of 8 ranks under ZeRO-3 resumes on 2 under ZeRO-1. The moments of an optimizer
    ``by_rank`` are the exception. Every rank calls each of these.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict[str, Any]],
        optim: OptimConfig,
        config: dict[str, Any],
        *,
        keep_frozen: bool = True,
    ) -> None:
        """groups: see optim.parameter_groups. config: of optim.complete. keep_frozen: checkpoints
        include what is frozen; not so for an LLM, whose weights are in its own files."""
        self.stage = zero_stage(config)
        self.module = module
        self.keep_frozen = keep_frozen
        offloads = offloads_optimizer(config)
        if self.stage:
            refuse_old_deepspeed()
        # DeepSpeed rounds the weights in place, and makes the fp32 masters from what is left
        whole = {
            name: p.detach()
            for name, p in module.named_parameters()
            if p.requires_grad or p.numel() == 1
        }
        self.optimizer = chosen_optimizer(optim)
        optimizer, rates = self._make_optimizer(groups, optim, offloads=offloads)
        self._clip = 0.0
        if self.stage == 0:
            # step() computes the gradient norm of ZeRO-0 anyway; DeepSpeed's own clipping would
            # compute it again
            self._clip = float(config.get("gradient_clipping", 0.0))
            config = {**config, "gradient_clipping": 0.0}
        self.device_engine = started_engine(module, optimizer, config)
        self.monitors = Monitors(self.device_engine)
        if isinstance(optimizer, FlatAdamW):
            optimizer.parts = self._parts(rates)
        self._adapt_deepspeed(optimizer)
        self.accumulation: int = self.device_engine.gradient_accumulation_steps()
        self.device = torch.device(self.device_engine.device)
        # global, of the last step, before clipping; None if DeepSpeed reports none
        self.grad_norm: float | None = None
        self.trained: list[tuple[str, nn.Parameter]] = []
        self._constants: dict[nn.Parameter, Tensor] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self.trained.append((name, parameter))
            elif name in whole:
                self._constants[parameter] = whole[name]
        if any(parameter.dtype != torch.float32 for _, parameter in self.trained):
            self.write_trained(whole)

    def _adapt_deepspeed(self, optimizer: torch.optim.Optimizer) -> None:
        """Time what DeepSpeed sends, and leave out what it does twice or for nothing."""
        time_communication = timed("communication")
        reduce_gradients = self.device_engine.allreduce_gradients
        self.device_engine.allreduce_gradients = time_communication(reduce_gradients)
        computes_norm = getattr(
            self.device_engine.optimizer, "compute_grad_norm", False
        )
        if isinstance(optimizer, FlatAdamW) and computes_norm:
            # the norm, which is not finite if a gradient is not, says the same without another
            # collective
            self.device_engine.optimizer.check_overflow = lambda **_: None
        if self._scaler is not None:
            # the loop ends the run, and names the samples
            self._scaler.raise_error_at_min_scale = False
        if self.stage == 0 and world_size() == 1:
            # it would copy every gradient there and back
            self.device_engine.enable_backward_allreduce = False

    def _make_optimizer(
        self, groups: list[dict[str, Any]], optim: OptimConfig, *, offloads: bool
    ) -> tuple[torch.optim.Optimizer, dict[Tensor, Rates]]:
        """The optimizer that DeepSpeed gets, and the settings of each parameter for a FlatAdamW; {}
        for others."""
        on_gpu = torch.cuda.is_available()
        hyper: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
        if self.stage in (1, 2) and type(self.optimizer) is AdamW and not offloads:
            one_group, rates = as_one_group(groups)
            return FlatAdamW(one_group, **hyper, fused=on_gpu), rates
        if on_gpu and offloads:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, **hyper), {}
        return self.optimizer.make(groups, **hyper), {}

    def __call__(self, *inputs: Tensor | None, **options: int) -> Any:
        """The forward pass of the module."""
        return self.device_engine(*inputs, **options)

    @timed("backward")
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``; it is summed, not averaged, over the micro-batches of a
        step."""
        self.device_engine.backward(loss * self.accumulation)  # DeepSpeed divides by it

    @timed("optimizer")
    def step(self) -> None:
        """To be called after each micro-batch; the last call of a step updates the parameters."""
        if self.stage == 0 and self.device_engine.is_gradient_accumulation_boundary():
            grads = [p.grad for _, p in self.trained if p.grad is not None]
            self.grad_norm = float(nn.utils.get_total_norm(grads))
            # DeepSpeed leaves such an update out from ZeRO-1 on
            if not math.isfinite(self.grad_norm):
                self.device_engine.skipped_steps += 1
                for _, parameter in self.trained:
                    parameter.grad = None
            elif 0 < self._clip < self.grad_norm:
                torch._foreach_mul_(grads, self._clip / self.grad_norm)
        self.device_engine.step()

    def read(self, numbers: Tensor) -> list[float]:
        """(n,) numbers of the last step on the host, which waits for the device, and ``grad_norm``
        with them."""
        norm = self.grad_norm
        if self.stage:
            norm = self.device_engine.get_global_grad_norm()
        if norm is None:
            return numbers.tolist()
        norm_as_numbers = torch.as_tensor(norm).to(numbers).reshape(1)
        *values, self.grad_norm = torch.cat([numbers, norm_as_numbers]).tolist()
        return values

    @property
    def skipped(self) -> int:
        """Updates left out so far because their gradient was not finite."""
        return int(self.device_engine.skipped_steps)

    @property
    def can_lower_loss_scale(self) -> bool:
        """Whether the next overflow in fp16 makes the loss scale smaller: a dynamic one, not at its
        minimum yet."""
        scaler = self._scaler
        return (
            scaler is not None
            and scaler.dynamic
            and scaler.cur_scale > scaler.min_scale
        )

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, to set the learning rate."""
        return self.device_engine.optimizer.param_groups

    def fp32(self, parameter: nn.Parameter) -> Tensor:
        """The full value of a trained parameter, or of a frozen one of one element, as it was
        before DeepSpeed rounded it; a collective if the weights are partitioned or rounded."""
        if not parameter.requires_grad:
            return self._constants[parameter].to(self.device, torch.float32)
        exact = self.stage < 3 and parameter.dtype == torch.float32
        value = parameter.detach() if exact else self._read(parameter)
        return value.to(self.device, torch.float32)

    @timed("optimizer")
    def clamp(self, parameter: nn.Parameter, low: float, high: float) -> Tensor:
        """Clamp a trained parameter and its fp32 master; returns a copy of the latter, complete."""
        master = self.fp32(parameter)
        clamped = master.clamp(low, high)
        # the comparison makes the host wait, writing does not
        if self.stage < 3 or not torch.equal(master, clamped):
            self._write(parameter, clamped)
            with self.gathered([parameter], modify=True):
                parameter.data.clamp_(low, high)
        return clamped

    def gathered(
        self, parameters: list[nn.Parameter], *, modify: bool = False
    ) -> AbstractContextManager[None]:
        """Full values of parameters that ZeRO-3 has partitioned; ``modify``: rank 0's changes are
        kept."""
        modifier = 0 if modify else None
        return deepspeed.zero.GatheredParameters(
            parameters, modifier_rank=modifier, enabled=self.stage == 3
        )

    def weights(self, copy: Copy | None) -> dict[str, Tensor]:
        """fp32 values of all parameters, and all persistent buffers, as made by ``copy``; {} on
        ranks without one."""
        values = self.read_trained(copy)
        for name, parameter in self.module.named_parameters():
            if self.keep_frozen and not parameter.requires_grad:
                with self.gathered([parameter]):
                    if copy:
                        values[name] = copy(name, parameter, torch.float32)
        if copy and self.keep_frozen:
            persistent = self.module.state_dict(keep_vars=True).keys()
            for name, buffer in self.module.named_buffers():
                if name in persistent:
                    values[name] = copy(name, buffer)
        return values

    def read_trained(
        self, copy: Copy | None, names: Collection[str] | None = None, suffix: str = ""
    ) -> dict[str, Tensor]:
        """The masters of trained parameters (names: all by default), as made by ``copy`` under NAME
        + suffix; {} on ranks without one."""
        values: dict[str, Tensor] = {}
        for name, parameter in self.trained:
            if names is None or name in names:
                master = self._read(parameter)
                if copy:
                    values[name + suffix] = copy(name + suffix, master)
        return values

    def write_trained(self, values: Mapping[str, Tensor], suffix: str = "") -> None:
        """The inverse of ``read_trained``: each rank writes its part of the masters."""
        for name, parameter in self.trained:
            if name + suffix in values:
                self._write(parameter, values[name + suffix].to(self.device))

    @contextmanager
    def exchanged(self, others: list[Tensor]) -> Iterator[None]:
        """Inside the block, ``masters()`` hold the values of ``others``, and ``others`` theirs, to
        be read and written by name."""
        self._exchange(others)
        yield
        self._exchange(others)

    @torch.no_grad()
    def _exchange(self, others: list[Tensor]) -> None:
        for master, other in zip(self.masters(), others, strict=True):
            blocks = torch.atleast_1d(master.data).split(EXCHANGED)
            other_blocks = torch.atleast_1d(other.data).split(EXCHANGED)
            for block, other_block in zip(blocks, other_blocks, strict=True):
                value = block.clone()
                block.copy_(other_block)
                other_block.copy_(value)

    def moments(self, copy: Copy | None) -> dict[str, Tensor]:
        """The optimizer's moments, as made by ``copy``; {} before the first update and on ranks
        without one."""
        if self.updates == 0:
            return {}
        if self.optimizer.by_rank:
            return {
                name: copy(name, value)
                for name, value in self._moments_by_rank()
                if copy
            }
        values: dict[str, Tensor] = {}
        for moment in self.optimizer.moments:
            with self.exchanged(self._moment(moment)):
                values |= self.read_trained(copy, suffix=f".{moment}")
        return values

    def _moment(self, name: str) -> list[Tensor]:
        """That of each master; zeros of one that has had no gradient."""
        states = self._base.state
        return [
            states[master][name] if master in states else torch.zeros_like(master.data)
            for master in self.masters()
        ]

    def _moments_by_rank(self) -> Iterator[tuple[str, Tensor]]:
        """Those of all ranks, whose masters have the same shapes."""
        for source in range(self._parted):
            for name, held in self._held(source):
                value = held.clone()
                if self._parted > 1:
                    dist.broadcast(value, source)
                yield name, value

    def _held(self, source: int) -> Iterator[tuple[str, Tensor]]:
        """The moments of this rank's masters, named as if it were rank ``source``:
        ``zero2-of-4.0.1.state1`` is of rank 0's second master. One that is too small for 8 bits has
        fewer."""
        prefix = f"zero{self.stage}-of-{self._parted}.{source}"
        for number, master in enumerate(self.masters()):
            state = self._base.state.get(master, {})
            for moment in self.optimizer.moments:
                if moment in state:
                    yield f"{prefix}.{number}.{moment}", state[moment]

    @property
    def _parted(self) -> int:
        """Among how many ranks the masters are parted."""
        return world_size() if self.stage else 1

    def restore(
        self,
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
        state: dict[str, Any],
    ) -> None:
        """Put back what ``weights``, ``moments`` and ``scaler_state`` returned. The module held
        ``weights`` when the engine was made; here the fp32 masters get the digits that a
        half-precision module lost.

        Raises ValueError if another kind of optimizer wrote the moments, or one ``by_rank`` on
        other ranks.
        """
        self.write_trained(weights)
        if moments:
            updates = int(state["updates"])
            for master in self.masters():
                empty = self.optimizer.empty_state(self._base, master, updates)
                self._base.state[master] = empty
            if self.optimizer.by_rank:
                self._restore_by_rank(moments)
            else:
                self._restore_by_name(moments)
        scaler = self._scaler
        for field, value in state["scaler"].items():
            if scaler is not None and field in vars(scaler):
                setattr(scaler, field, value)

    def _restore_by_name(self, moments: Mapping[str, Tensor]) -> None:
        expected = {
            f"{name}.{moment}"
            for name, _ in self.trained
            for moment in self.optimizer.moments
        }
        if not expected & moments.keys():
            raise ValueError(
                f"the checkpoint has no moments of {self.optimizer.name}: "
                "resume with its own --optimizer"
            )
        for moment in self.optimizer.moments:
            with self.exchanged(self._moment(moment)):
                self.write_trained(moments, f".{moment}")

    def _restore_by_rank(self, moments: Mapping[str, Tensor]) -> None:
        for name, held in self._held(rank() % self._parted):
            saved = moments.get(name)
            if saved is None or (saved.shape, saved.dtype) != (held.shape, held.dtype):
                raise ValueError(
                    f"the checkpoint has no optimizer state {name!r} of this shape: "
                    "optimizer state is tied to rank count, ZeRO stage and --optimizer; "
                    "resume with the original ones"
                )
            held.copy_(saved)

    @property
    def updates(self) -> int:
        """Updates that the optimizer has made; fp16 steps that overflowed don't count."""
        for state in self._base.state.values():
            if "step" in state:
                return int(state["step"])
        return 0

    def scaler_state(self) -> dict[str, Any]:
        """Updates, and the fields of the fp16 loss scale."""
        fields = vars(self._scaler) if self._scaler is not None else {}
        return {
            "updates": self.updates,
            "scaler": {key: fields[key] for key in SCALER_FIELDS if key in fields},
        }

    def _read(self, parameter: nn.Parameter) -> Any:
        """The full fp32 master; a collective under ZeRO."""
        return safe_get_full_fp32_param(parameter) if self.stage > 0 else parameter.data

    def _write(self, parameter: Any, value: Tensor) -> None:
        """The inverse of ``_read``: each rank writes its part of ``value``."""
        if self.stage == 3:
            # safe_set_full_fp32_param runs past the end of a parameter whose size is not a multiple
            # of the ranks
            size = parameter.ds_tensor.numel()
            padded = value.new_zeros(size * world_size())
            padded[: value.numel()] = value.flatten()
            safe_set_local_fp32_param(parameter, padded.narrow(0, size * rank(), size))
        elif self.stage > 0:
            safe_set_full_fp32_param(parameter, value)
        else:
            parameter.data.copy_(value)

    @property
    def _base(self) -> torch.optim.Optimizer:
        """The optimizer itself, inside whatever DeepSpeed wrapped around it."""
        optimizer = self.device_engine.optimizer
        if isinstance(optimizer, torch.optim.Optimizer):
            return optimizer
        return optimizer.optimizer

    @property
    def _scaler(self) -> Any:
        """The object that holds the dynamic loss scale; None if nothing is scaled."""
        if not self.device_engine.fp16_enabled():
            return None
        return self.device_engine.optimizer.loss_scaler

    def masters(self) -> list[Tensor]:
        """The fp32 tensors that the optimizer updates on this rank: the parameters, or flat
        partitions of them."""
        optimizer = self.device_engine.optimizer
        if self.stage == 3:
            return optimizer.fp32_partitioned_groups_flat
        if hasattr(optimizer, "fp32_groups_flat_partition"):  # BF16_Optimizer
            return optimizer.fp32_groups_flat_partition
        if self.stage > 0:
            return optimizer.single_partition_of_fp32_groups
        return [p for group in self._base.param_groups for p in group["params"]]

    def _parts(
        self, rates: Mapping[Tensor, Rates]
    ) -> dict[Tensor, dict[Rates, list[slice]]]:
        """Where this rank's masters hold parameters of the same rates, under ZeRO-1 and 2."""
        optimizer = self.device_engine.optimizer
        parts = {}
        if hasattr(optimizer, "bit16_groups"):
            layers = optimizer.bit16_groups
        else:
            layers = optimizer.bf16_groups
        for master, parameters in zip(self.masters(), layers, strict=True):
            by_rate: dict[Rates, list[slice]] = parts.setdefault(master, {})
            for parameter in parameters:
                if parameter._hp_mapping is None:  # another rank's
                    continue
                address = parameter._hp_mapping.get_hp_fragment_address()
                slices = by_rate.setdefault(rates[parameter], [])
                start = address.start
                # together with the one before it
                if slices and slices[-1].stop == start:
                    start = slices.pop().start
                slices.append(slice(start, address.start + address.numel))
        return parts
