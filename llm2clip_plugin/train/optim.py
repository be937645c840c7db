"""The optimizers, their parameter groups, the learning-rate schedule, and DeepSpeed's JSON.

Groups: layer-wise lr decay (Bao et al. 2021, arXiv 2106.08254, section 3.2): a parameter at depth d
of ``top`` gets ``layer_decay ** (top - d)`` of the learning rate. Weight decay is not applied to
vectors (norms, biases, class tokens, the logit scale) and position tables.

A *master* is a tensor that the optimizer updates: a parameter under ZeRO-0; under ZeRO-1 to 3 this
rank's part of a flat fp32 buffer that holds many parameters, whose boundaries have nothing to do
with those of the part.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from llm2clip_plugin.json_files import read_json_value
from llm2clip_plugin.options import unknown
from llm2clip_plugin.train.config import (
    OptimConfig,
    Precision,
    TrainConfig,
    from_named_args,
)

BLOCK = 256  # values that share a magnitude, in bitsandbytes
# ZeRO's: gradients are sent during backward
REDUCTION = {"reduce_bucket_size": 50_000_000, "overlap_comm": True}
# from so many on, half-precision gradients are reduced in fp32 unless set otherwise
FP32_REDUCTION_RANKS = 16
# of DeepSpeed's
SECTIONS = ("zero_optimization", "fp16", "bf16", "data_types", "optimizer", "scheduler")
# train.report_to -> its section
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "csv": "csv_monitor"}
State = dict[str, Any]  # optimizer.state[master]
Rates = tuple[float, float]  # peak learning rate and weight decay
# of parameters with their own ``lr`` and ``weight_decay``
Groups = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """``--optimizer adamw``: Loshchilov & Hutter 2019, arXiv 1711.05101; torch's own, fused on
    GPUs. A checkpoint holds one tensor for each parameter and moment, ``NAME.exp_avg``, independent
    of ranks and stage."""

    name: ClassVar[str] = "adamw"
    # keys of a state that checkpoints hold
    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    # checkpoints hold the moments of each rank's masters as they are: resumed on as many ranks, at
    # the same ZeRO stage
    by_rank: ClassVar[bool] = False
    state_bytes: ClassVar[float] = 8.0  # of the moments of one parameter

    def make(
        self, groups: Groups, *, lr: float, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        """The optimizer over parameter groups."""
        # torch's own needs no C++ build, which takes minutes at first use; on CPUs the fused kernel
        # rounds differently
        return torch.optim.AdamW(
            groups, lr=lr, betas=betas, eps=eps, fused=torch.cuda.is_available()
        )

    def empty_state(self, optimizer: Any, master: Tensor, updates: int) -> State:
        """The state of a master after ``updates`` updates, with all moments zero."""
        # one step for each master: a shared tensor would advance once per master
        fused = bool(optimizer.defaults.get("fused"))
        step: Any = torch.tensor(
            float(updates), device=master.device if fused else "cpu"
        )
        if not isinstance(
            optimizer, torch.optim.AdamW
        ):  # DeepSpeedCPUAdam counts in Python
            step = updates
        return {
            "step": step,
            **{moment: torch.zeros_like(master.data) for moment in self.moments},
        }


class FlatAdamW(torch.optim.AdamW):
    """AdamW over a master that holds parameters of different settings: one group, and so one norm
    and gather of ZeRO. The group's ``lr`` is the schedule's factor."""

    # of each master; set once they are laid out
    parts: dict[Tensor, dict[Rates, list[slice]]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update each part of a master as a master of its own would be; there is no closure."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for master in group["params"]:
                if master.grad is None:
                    continue
                state = self.state[master]
                if not state:
                    state.update(AdamW().empty_state(self, master, 0))
                for (peak, weight_decay), parts in self.parts[master].items():
                    moments = [_cut(state[moment], parts) for moment in AdamW.moments]
                    steps = state["step"].repeat(len(parts))
                    adamw(
                        _cut(master, parts),
                        _cut(master.grad, parts),
                        *moments,
                        max_exp_avg_sqs=[],
                        state_steps=list(steps.unbind()),  # counted up inside
                        foreach=False,
                        fused=group["fused"],
                        amsgrad=False,
                        beta1=beta1,
                        beta2=beta2,
                        lr=group["lr"] * peak,
                        weight_decay=weight_decay,
                        eps=group["eps"],
                        maximize=False,
                    )
                state["step"] += 1


def _cut(flat: Tensor, parts: Sequence[slice]) -> list[Tensor]:
    """Views of these parts."""
    return [flat[part] for part in parts]


@dataclass(frozen=True, kw_only=True)
class AdamW8bit(AdamW):
    """``--optimizer adamw_8bit``: bitsandbytes', a quarter of the states' memory (Dettmers et al.
    2022, arXiv 2110.02861). Moments are in 8 bits, as an index into a table of values times the
    largest magnitude of their block of 256, which may end inside of a parameter; so a checkpoint
    holds each rank's states as they are.
    """

    min_8bit_size: int = 4096  # values of a master from which its moments are in 8 bits

    name: ClassVar[str] = "adamw_8bit"
    # bitsandbytes' names
    moments: ClassVar[tuple[str, ...]] = ("state1", "absmax1", "state2", "absmax2")
    by_rank: ClassVar[bool] = True
    state_bytes: ClassVar[float] = 2 * (1 + 4 / BLOCK)

    def make(
        self, groups: Groups, *, lr: float, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        from bitsandbytes.optim import AdamW8bit as Optimizer

        return Optimizer(
            groups, lr=lr, betas=betas, eps=eps, min_8bit_size=self.min_8bit_size
        )

    def empty_state(self, optimizer: Any, master: Tensor, updates: int) -> State:
        state: State = {"step": updates}
        if master.numel() < self.min_8bit_size:
            for number in (1, 2):
                moment = torch.zeros_like(master.data, dtype=torch.float32)
                state[f"state{number}"] = moment
            return state
        blocks = math.ceil(master.numel() / BLOCK)
        for number, table in ((1, "dynamic"), (2, "udynamic")):
            indices = torch.zeros_like(master.data, dtype=torch.uint8)
            largest = torch.zeros(blocks, dtype=torch.float32, device=master.device)
            state[f"state{number}"] = indices
            state[f"absmax{number}"] = largest
            state[f"qmap{number}"] = optimizer.name2qmap[table].to(master.device)
        return state


OPTIMIZERS: dict[str, type[AdamW]] = {
    optimizer.name: optimizer for optimizer in (AdamW, AdamW8bit)
}


def chosen_optimizer(config: OptimConfig) -> AdamW:
    """The chosen optimizer with its settings; ValueError names a setting that it does not have."""
    if config.name not in OPTIMIZERS:
        raise ValueError(unknown("optimizer", config.name, OPTIMIZERS))
    return from_named_args(OPTIMIZERS[config.name], config.args, where="optim.args")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A parameter that trains."""

    name: str
    parameter: nn.Parameter
    lr: float  # peak learning rate
    decay: bool  # whether weight decay applies


def is_vector(parameter: Tensor) -> bool:
    """Whether at most one dimension is larger than 1: biases, norms, class tokens, (1,) scales."""
    return parameter.numel() == max(parameter.shape, default=1)


def parameter_groups(trained: Iterable[Trained], weight_decay: float) -> Groups:
    """The optimizer's groups, one per (learning rate, weight decay), in order of first use; the
    schedule multiplies the ``peak_lr`` of a group."""
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for item in trained:
        new = {
            "params": [],
            "lr": item.lr,
            "peak_lr": item.lr,
            "weight_decay": weight_decay if item.decay else 0.0,
        }
        groups.setdefault((item.lr, item.decay), new)["params"].append(item.parameter)
    return list(groups.values())


def as_one_group(groups: Groups) -> tuple[Groups, dict[Tensor, Rates]]:
    """One group of all parameters, for FlatAdamW, and the settings of each."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    rates = {
        p: (group["peak_lr"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    return [{"params": parameters, "lr": 1.0, "peak_lr": 1.0}], rates


# name of OptimConfig.schedule -> how much of the learning rate above its minimum is left, by the
# fraction of the steps after the warm-up that are done
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


def lr_factor(step: int, total_steps: int, config: OptimConfig) -> float:
    """Fraction of the peak learning rate at ``step`` (the first is 0)."""
    warmup = config.warmup(total_steps)
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shape = SCHEDULES[config.schedule](done)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


def set_lr(groups: Groups, factor: float) -> None:
    """Set the learning rate of each group to ``factor`` times its peak."""
    for group in groups:
        group["lr"] = group["peak_lr"] * factor


# DeepSpeed's JSON: "auto" values are filled in, and what the run sets (batch, precision, clipping,
# optimizer, schedule) may be absent, "auto", or equal; all else is passed on unchanged.


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """The user's file, or a ZeRO-0 configuration for "". Raises OSError, or ValueError for invalid
    JSON."""
    if not path:
        return {"zero_optimization": {"stage": 0}}
    if isinstance(body := read_json_value(path), dict):
        return body
    raise ValueError(f"{path} contains a {type(body).__name__}, expected a JSON object")


def complete(
    user: dict[str, Any],
    train: TrainConfig,
    optim: OptimConfig,
    *,
    world: int,
    hidden_size: int,
    output_dir: str = "",
    where: str = "the DeepSpeed configuration",
) -> dict[str, Any]:
    """The configuration for ``deepspeed.initialize``; ValueError lists every conflict with the run,
    or says that ``world`` ranks cannot share its batch. hidden_size: of the tower, sets the sizes
    of ZeRO-3's "auto" buckets.

    ``optimizer`` and ``scheduler`` sections are removed, and conflict if they set a value: the
    engine builds the optimizer (for layer-wise groups), and the loop sets the learning rate.
    Half-precision gradients of 16 ranks or more are reduced in fp32 if neither the file nor the run
    sets a type.
    """
    _refuse_unknown_sections(user, where)
    config = copy.deepcopy(user)
    conflicts = _remove_optimizer(config, optim.name)
    conflicts += _set_run_values(config, train, optim, world)
    if conflicts:
        listed = "\n  ".join(conflicts)
        raise ValueError(f"{where} conflicts with the run:\n  {listed}")
    is_half = train.precision != "fp32"
    reduced = config.get("communication_data_type", "auto")
    if is_half and world >= FP32_REDUCTION_RANKS and reduced == "auto":
        config["communication_data_type"] = "fp32"
    _fill_zero(config, train.precision, hidden_size)
    if type(chosen_optimizer(optim)) is not AdamW:
        if offloads_optimizer(config):
            raise ValueError(
                f"{where} offloads optimizer states: set --optimizer adamw, "
                "or remove offload_optimizer"
            )
        config.setdefault("zero_allow_untested_optimizer", True)
    run = Path(output_dir)
    for monitor in train.report_to:
        run_settings = {"output_path": str(run / "monitor"), "job_name": run.name}
        if monitor == "wandb":
            run_settings = {"project": "llm2clip", "group": run.name}
        config.setdefault(MONITORS[monitor], {"enabled": True, **run_settings})
    # the run has its own progress bar, and its own clock:
    config.setdefault("steps_per_print", 1 << 31)
    # this one waits for the GPU at every micro-batch
    config.setdefault("timers", {"throughput": {"enabled": False}})
    return config


def _refuse_unknown_sections(user: dict[str, Any], where: str) -> None:
    """Raise ValueError for a section that is misspelt, is no object, or is not supported."""
    for name in user:
        if name in SECTIONS:
            continue
        # DeepSpeed ignores what it does not know, and would train without it
        near = get_close_matches(name, SECTIONS, 1, 0.85)
        if near:
            raise ValueError(
                f"{where}: unknown key {name!r}; did you mean {near[0]!r}?"
            )
    for name in SECTIONS:
        if not isinstance(user.get(name, {}), dict):
            raise ValueError(f"{where}: {name} is {user[name]!r}, expected an object")
    if _offload_device(user) == "nvme":
        raise ValueError(
            f"{where}: offload_optimizer to NVMe is not supported; use the device cpu"
        )


def _remove_optimizer(config: dict[str, Any], optimizer: str) -> list[str]:
    """Remove the sections of an optimizer and a schedule; returns the conflicts with those of the
    run."""
    conflicts = []
    kind = config.get("optimizer", {}).get("type", "AdamW")
    for section in ("optimizer", "scheduler"):
        for name, value in config.pop(section, {}).get("params", {}).items():
            if value != "auto":
                conflicts.append(
                    f'{section}.params.{name} is {value!r}, expected "auto": '
                    "the run has --lr, --weight-decay, --warmup-steps, ..."
                )
    if kind not in ("Adam", "AdamW"):
        conflicts.append(
            f"optimizer.type is {kind!r}, but the run uses {optimizer!r} (--optimizer)"
        )
    return conflicts


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of a configuration, 0 by default."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Whether optimizer states live on the CPU."""
    return _offload_device(config) not in ("none", None)


def _offload_device(config: dict[str, Any]) -> str | None:
    """Where the optimizer's states live if not with the weights."""
    zero = config.get("zero_optimization", {})
    return zero.get("offload_optimizer", {}).get("device", "none")


def _set_run_values(
    config: dict[str, Any], train: TrainConfig, optim: OptimConfig, world: int
) -> list[str]:
    """Set what the run decides; returns the conflicts."""
    _, micro_batch, accumulation = train.rows(world)
    rows: list[tuple[str, Any, str]] = [
        ("train_batch_size", train.global_batch, "--global-batch"),
        ("train_micro_batch_size_per_gpu", micro_batch, "--micro-batch"),
        ("gradient_accumulation_steps", accumulation, "--micro-batch"),
        ("gradient_clipping", optim.max_grad_norm, "--max-grad-norm"),
    ]
    if reduced_in := train.communication_data_type:
        rows.append(
            ("communication_data_type", reduced_in, "--communication-data-type")
        )
    for kind in ("bf16", "fp16"):
        if kind in config or train.precision == kind:
            rows.append((f"{kind}.enabled", train.precision == kind, "--precision"))
    computes_norm = "compute_grad_norm" in config.get("zero_optimization", {})
    # DeepSpeed leaves out an update whose gradient is not finite
    if train.precision == "bf16":
        rows.append(("bf16.check_grad_overflow", True, "--skip-bad-batches"))
    elif train.precision == "fp32" and computes_norm:
        # its only check
        rows.append(("zero_optimization.compute_grad_norm", True, "--skip-bad-batches"))
    conflicts = []
    for path, value, option in rows:
        section, _, name = path.rpartition(".")
        inside = config.setdefault(section, {}) if section else config
        configured = inside.get(name, "auto")
        if configured not in ("auto", value):
            conflicts.append(
                f"{path} is {configured!r}, but the run uses {value!r} ({option})"
            )
        inside[name] = value
    return conflicts


def _fill_zero(config: dict[str, Any], precision: Precision, hidden_size: int) -> None:
    """Fill ZeRO's "auto" sizes as Hugging Face's integration does, and set what an external
    optimizer needs."""
    zero = config.setdefault("zero_optimization", {"stage": 0})
    square = hidden_size**2
    for name, value in (
        ("reduce_bucket_size", square),
        ("allgather_bucket_size", square),
        ("stage3_prefetch_bucket_size", int(0.9 * square)),
        ("stage3_param_persistence_threshold", 10 * hidden_size),
        ("stage3_gather_16bit_weights_on_model_save", False),
    ):
        if zero.get(name) == "auto":
            zero[name] = value
    if precision != "fp32" and zero.get("stage", 0) == 0:
        # same results in less memory; DeepSpeed's fp16 optimizer of stage 0 divides gradients by a
        # loss scale that was never applied, and starts AdamW with a step of zero gradients
        zero["stage"] = 1
    if zero.get("stage", 0):
        config["zero_optimization"] = {**REDUCTION, **zero}
    if offloads_optimizer(config):
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    accumulates = config["gradient_accumulation_steps"] > 1
    if precision == "bf16" and accumulates and zero.get("stage", 0) >= 1:
        # in bf16, a micro-batch's gradient below 1/256 of the sum so far is rounded away
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
