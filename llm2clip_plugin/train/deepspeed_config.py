"""DeepSpeed's JSON: the user's own file, "auto" values filled in, conflicts refused with both values.

What the file says about ZeRO, offload, buckets, precision windows, profilers and monitors is passed on as
it is. What the run decides (batch, precision, clipping, AdamW, schedule) may be absent, "auto", or equal.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm2clip_plugin.train.optim import OptimConfig

Precision = Literal["fp32", "bf16", "fp16"]
SCHEDULERS = {  # DeepSpeed's scheduler -> optim.schedule
    "WarmupLR": "constant",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
}
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "csv": "csv_monitor"}  # train.report_to -> its section


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """What the run has decided, in DeepSpeed's terms."""

    global_batch: int  # pairs an optimizer step, over all ranks
    micro_batch: int  # pairs a forward pass on one rank
    accumulation: int  # micro-batches an optimizer step on one rank
    precision: Precision
    optim: OptimConfig
    warmup_steps: int
    total_steps: int
    hidden_size: int  # of the tower: sets the sizes of ZeRO-3's "auto" buckets
    report_to: tuple[str, ...] = ()  # tensorboard | wandb | csv
    output_dir: str = ""
    run_name: str = ""


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """The user's file, or a ZeRO-0 configuration for "" ; FileNotFoundError or ValueError name the file."""
    if not path:
        return {"zero_optimization": {"stage": 0}}
    if not Path(path).is_file():
        raise FileNotFoundError(f"no DeepSpeed configuration at {path}")
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ValueError(f"{path} holds a {type(body).__name__}, expected an object of DeepSpeed settings")
    return body


def complete(user: dict[str, Any], plan: EnginePlan, *, where: str = "the DeepSpeed configuration") -> dict[str, Any]:
    """The configuration that DeepSpeed gets. ``optimizer`` and ``scheduler`` sections are checked and taken
    out: AdamW is built here (layer-wise groups), and the loop sets the learning rate."""
    config = copy.deepcopy(user)
    conflicts: list[str] = []
    for path, value, option in _decided(plan, config):
        _settle(config, path.split("."), value, option, conflicts)
    _check_optimizer(config.pop("optimizer", None), plan, conflicts)
    _check_scheduler(config.pop("scheduler", None), plan, conflicts)
    if conflicts:
        raise ValueError(f"{where} contradicts the run:\n  " + "\n  ".join(conflicts))
    _fill_zero(config, plan)
    _set_up_optimizer(config, plan, where)
    _add_monitors(config, plan)
    if left := sorted(_paths_with_auto(config)):
        raise ValueError(f'{where}: no value is known for the "auto" of {", ".join(left)}; write a number there')
    config.setdefault("steps_per_print", 1 << 31)  # the run has a progress bar of its own
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """The stage that a configuration asks for."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Whether optimizer states live on the CPU (or NVMe)."""
    device = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    return device not in ("none", None)


def _decided(plan: EnginePlan, config: dict[str, Any]) -> list[tuple[str, Any, str]]:
    """(path in the JSON, the run's value, the option that sets it)."""
    rows = [
        ("train_batch_size", plan.global_batch, "--train.global-batch"),
        ("train_micro_batch_size_per_gpu", plan.micro_batch, "--train.micro-batch"),
        ("gradient_accumulation_steps", plan.accumulation, "--train.micro-batch"),
        ("gradient_clipping", plan.optim.max_grad_norm, "--optim.max-grad-norm"),
    ]
    for kind in ("bf16", "fp16"):
        if kind in config or plan.precision == kind:
            rows.append((f"{kind}.enabled", plan.precision == kind, "--train.precision"))
    return rows


def _settle(config: dict[str, Any], path: list[str], value: Any, option: str, conflicts: list[str]) -> None:
    """Put ``value`` at ``path``; note a conflict if the user has another one there."""
    for name in path[:-1]:
        config = config.setdefault(name, {})
    given = config.get(path[-1], "auto")
    if given != "auto" and not _same(given, value):
        conflicts.append(f"{'.'.join(path)} is {given!r} there, the run's is {value!r} ({option})")
    config[path[-1]] = value


def _same(given: Any, value: Any) -> bool:
    """Equality that takes JSON's lists for tuples."""
    return list(given) == list(value) if isinstance(given, list) and isinstance(value, tuple) else given == value


def _check_optimizer(section: dict[str, Any] | None, plan: EnginePlan, conflicts: list[str]) -> None:
    if section is None:
        return
    if section.get("type") not in plan.optim.optimizer().deepspeed_types:
        conflicts.append(
            f"optimizer.type is {section.get('type')!r} there, the run's is {plan.optim.name!r} (--optim.name); remove "
            "the section"
        )
    known = {name: getattr(plan.optim, name) for name in ("lr", "betas", "eps", "weight_decay")}
    for name, given in section.get("params", {}).items():
        if name in known and given != "auto" and not _same(given, known[name]):
            conflicts.append(f"optimizer.params.{name} is {given!r} there, the run's is {known[name]!r} (--optim)")


def _check_scheduler(section: dict[str, Any] | None, plan: EnginePlan, conflicts: list[str]) -> None:
    if section is None:
        return
    kind, params = section.get("type"), section.get("params", {})
    if SCHEDULERS.get(str(kind)) != plan.optim.schedule:
        means = f" ({SCHEDULERS[kind]})" if kind in SCHEDULERS else ""
        conflicts.append(f"scheduler.type is {kind!r}{means}, the run's is {plan.optim.schedule!r} (--optim.schedule)")
    known = {
        "warmup_num_steps": plan.warmup_steps,
        "total_num_steps": plan.total_steps,
        "warmup_max_lr": plan.optim.lr,
        "warmup_min_lr": 0,
    }
    for name, given in params.items():
        if name in known and given != "auto" and given != known[name]:
            conflicts.append(f"scheduler.params.{name} is {given!r} there, the run's is {known[name]!r} (--optim)")


def _fill_zero(config: dict[str, Any], plan: EnginePlan) -> None:
    """ZeRO's "auto" sizes as Hugging Face's integration fills them, and what a client optimizer needs."""
    zero = config.setdefault("zero_optimization", {"stage": 0})
    square = plan.hidden_size**2
    for name, value in (
        ("reduce_bucket_size", square),
        ("allgather_bucket_size", square),
        ("stage3_prefetch_bucket_size", int(0.9 * square)),
        ("stage3_param_persistence_threshold", 10 * plan.hidden_size),
    ):
        if zero.get(name) == "auto":
            zero[name] = value
    if zero.get("stage3_gather_16bit_weights_on_model_save") == "auto":
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    if plan.precision != "fp32" and zero.get("stage", 0) == 0:
        # the same numbers in less memory; DeepSpeed's own fp16 optimizer for stage 0 divides gradients by a loss
        # scale that it never multiplied in, and starts AdamW with a step of zero gradients
        zero["stage"] = 1
    if offloads_optimizer(config):
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    if plan.precision == "bf16" and plan.accumulation > 1 and zero.get("stage", 0) >= 1:
        # bf16 sums of many micro-batches lose what is smaller than 1/256 of the sum
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")


def _set_up_optimizer(config: dict[str, Any], plan: EnginePlan, where: str) -> None:
    """What DeepSpeed needs for the optimizer; ValueError if it cannot run under the configuration."""
    optimizer = plan.optim.optimizer()
    if offloads_optimizer(config) and not optimizer.supports_offload:
        raise ValueError(
            f"{where} offloads optimizer states to the host, where DeepSpeed only has an fp32 Adam, not optim.name "
            f"{optimizer.name}: remove zero_optimization.offload_optimizer, or set --optim.name adamw"
        )
    if zero_stage(config) > 0:
        for name, value in optimizer.deepspeed_settings.items():
            config.setdefault(name, value)


def _add_monitors(config: dict[str, Any], plan: EnginePlan) -> None:
    """A section for each monitor asked for that the file does not set up itself; ValueError without its package."""
    for monitor in plan.report_to:
        section: dict[str, Any] = {"enabled": True}
        if monitor == "wandb":
            section |= {"project": "llm2clip"} | ({"group": plan.run_name} if plan.run_name else {})
        else:
            section |= {"output_path": str(Path(plan.output_dir) / "monitor"), "job_name": plan.run_name or monitor}
        config.setdefault(MONITORS[monitor], section)
    for package in ("tensorboard", "wandb"):  # DeepSpeed would say so only after the models are loaded
        if config.get(package, {}).get("enabled") and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"the run reports to {package}, which is not installed: pip install {package}, or leave it out of "
                "--report_to (and of the DeepSpeed configuration)"
            )


def _paths_with_auto(value: Any, path: str = "") -> list[str]:
    """Where "auto" still stands."""
    if value == "auto":
        return [path]
    if isinstance(value, dict):
        return [hit for name, item in value.items() for hit in _paths_with_auto(item, f"{path}.{name}".lstrip("."))]
    return []
