"""DeepSpeed's JSON: fill in the user's "auto" values, and report conflicts with the run's settings.

Settings of ZeRO, offload, buckets, loss scaling, profilers and monitors are passed on unchanged. What the run sets
(batch, precision, clipping, optimizer, schedule) may be absent, "auto", or equal.
"""

import copy
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from llm2clip_plugin.options import closest, nearest
from llm2clip_plugin.train.config import OptimConfig, Precision, ReductionType

# A DeepSpeed JSON against what DeepSpeed itself reads: unknown keys and refused values, named with the file.

SECTIONS = ("zero_optimization", "fp16", "bf16", "optimizer", "scheduler", "data_types", "aio", "flops_profiler")
MONITOR_SECTIONS = ("tensorboard", "wandb", "csv_monitor", "comet")
STAGES = (0, 1, 2, 3)
COMMENTS = ("_", "/", "#")  # names that begin so are nobody's
SIMILAR = 0.85  # a misspelling


class _LookedUp(dict[str, Any]):
    """A configuration that notes which names are looked up in it; so do its copies, in the same set."""

    names: set[str]

    def __contains__(self, name: object) -> bool:
        self._note(name)
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self._note(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._note(name)
        return super().get(name, default)

    def _note(self, name: object) -> None:
        if hasattr(self, "names"):
            self.names.add(str(name))


def check_sections(config: dict[str, Any], where: str) -> None:
    """Raise ValueError for a section that is no object, or a ZeRO stage that does not exist."""
    for name in (*SECTIONS, *MONITOR_SECTIONS):
        section = config.get(name, {})
        if not isinstance(section, dict):
            raise ValueError(f'{where}: {name} is {section!r}, expected an object such as {{"enabled": true}}')
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if isinstance(stage, bool) or stage not in STAGES:
        raise ValueError(f"{where}: zero_optimization.stage is {stage!r}; known: {', '.join(map(str, STAGES))}")


def check_keys(
    config: dict[str, Any], where: str, *, read: Callable[[dict[str, Any]], object], models: Iterable[type[BaseModel]]
) -> None:
    """Let DeepSpeed ``read`` a completed configuration. Raises ValueError that names the file, the key and, for a
    misspelled one, the nearest; a name that nothing looks up and that resembles none is a warning on stderr.

    models: DeepSpeed's sections, whose fields are the known names in them.
    """
    looked_up = _LookedUp(config)
    looked_up.names = set()
    try:
        read(looked_up)
    except ValidationError as error:
        raise ValueError(f"{where}: {_describe(error, config, models)}") from error
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        raise ValueError(f"{where}: DeepSpeed refuses it: {error}") from error
    for name in config:
        if name in looked_up.names or name.startswith(COMMENTS):
            continue
        if near := closest(name, sorted(looked_up.names), SIMILAR):
            raise ValueError(f"{where}: unknown key {name!r}; did you mean {near!r}?")
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {where}: DeepSpeed does not read the key {name!r}; it has no effect", file=sys.stderr)


def _describe(error: ValidationError, config: dict[str, Any], models: Iterable[type[BaseModel]]) -> str:
    """The first refused value: its dotted path, what it is, and what is expected."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    sections = [name for name, value in config.items() if isinstance(value, dict) and path and path[0] in value]
    section = sections[0] if sections else ""
    name = ".".join([section, *path] if section else path)
    if first["type"] == "extra_forbidden":
        fields = sorted({field for model in models for field in model.model_fields})
        parents = name.split(".")[:-1]
        return f"unknown key {name!r}" + nearest(path[-1], fields, lambda near: repr(".".join([*parents, near])))
    expected = first["msg"].removeprefix("Input should be ")
    return f"{name} is {first['input']!r}, expected {expected}"


SCHEDULERS = {  # DeepSpeed's scheduler -> optim.schedule
    "WarmupLR": "constant",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
}
FP32_REDUCTION_RANKS = 16  # from so many on, half-precision gradients are reduced in fp32 unless set otherwise
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "csv": "csv_monitor"}  # train.report_to -> its section


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """The run's settings, in DeepSpeed's terms."""

    global_batch: int  # pairs per optimizer step, over all ranks
    micro_batch: int  # pairs per forward pass on one rank
    accumulation: int  # micro-batches per optimizer step on one rank
    precision: Precision
    optim: OptimConfig
    warmup_steps: int
    total_steps: int
    hidden_size: int  # of the tower: sets the sizes of ZeRO-3's "auto" buckets
    communication_data_type: ReductionType = ""  # in which gradients are reduced over ranks; "": see complete
    report_to: tuple[str, ...] = ()  # tensorboard | wandb | csv
    output_dir: str = ""
    run_name: str = ""


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """The user's file, or a ZeRO-0 configuration for "". Raises FileNotFoundError, or ValueError for invalid JSON."""
    if not path:
        return {"zero_optimization": {"stage": 0}}
    if not Path(path).is_file():
        raise FileNotFoundError(f"no DeepSpeed configuration at {path}")
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ValueError(f"{path} contains a {type(body).__name__}, expected a JSON object of DeepSpeed settings")
    return body


def complete(user: dict[str, Any], plan: EnginePlan, *, where: str = "the DeepSpeed configuration") -> dict[str, Any]:
    """The configuration for ``deepspeed.initialize``; ValueError lists every conflict with the run.

    ``optimizer`` and ``scheduler`` sections are checked and removed: the engine builds the optimizer (for layer-wise
    groups), and the loop sets the learning rate. Half-precision gradients of 16 ranks or more are reduced in fp32 if
    neither the file nor the run sets a type.
    """
    config = copy.deepcopy(user)
    check_sections(config, where)
    conflicts: list[str] = []
    for path, value, option in _run_settings(plan, config):
        _set_or_conflict(config, path.split("."), value, option, conflicts)
    _check_optimizer(config.pop("optimizer", None), plan, conflicts)
    _check_scheduler(config.pop("scheduler", None), plan, conflicts)
    if conflicts:
        raise ValueError(f"{where} conflicts with the run:\n  " + "\n  ".join(conflicts))
    ranks = plan.global_batch // (plan.micro_batch * plan.accumulation)
    reduced = config.get("communication_data_type", "auto")
    if plan.precision != "fp32" and ranks >= FP32_REDUCTION_RANKS and reduced == "auto":
        config["communication_data_type"] = "fp32"
    _fill_zero(config, plan)
    _set_up_optimizer(config, plan, where)
    _add_monitors(config, plan)
    if unresolved := sorted(_paths_with_auto(config)):
        raise ValueError(f'{where}: cannot resolve "auto" of {", ".join(unresolved)}; set a value')
    config.setdefault("steps_per_print", 1 << 31)  # the run has its own progress bar
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of a configuration, 0 by default."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Whether optimizer states live on the CPU (or NVMe)."""
    device = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    return device not in ("none", None)


def _run_settings(plan: EnginePlan, config: dict[str, Any]) -> list[tuple[str, Any, str]]:
    """(path in the JSON, the run's value, the option that sets it)."""
    rows = [
        ("train_batch_size", plan.global_batch, "--global-batch"),
        ("train_micro_batch_size_per_gpu", plan.micro_batch, "--micro-batch"),
        ("gradient_accumulation_steps", plan.accumulation, "--micro-batch"),
        ("gradient_clipping", plan.optim.max_grad_norm, "--max-grad-norm"),
    ]
    if plan.communication_data_type:
        rows.append(
            ("communication_data_type", plan.communication_data_type, "--communication-data-type"),
        )
    for kind in ("bf16", "fp16"):
        if kind in config or plan.precision == kind:
            rows.append((f"{kind}.enabled", plan.precision == kind, "--precision"))
    return rows


def _set_or_conflict(config: dict[str, Any], path: list[str], value: Any, option: str, conflicts: list[str]) -> None:
    """Set ``value`` at ``path``; add to ``conflicts`` if the user set another one."""
    for name in path[:-1]:
        config = config.setdefault(name, {})
    given = config.get(path[-1], "auto")
    if given != "auto" and not _same(given, value):
        conflicts.append(f"{'.'.join(path)} is {given!r}, but the run uses {value!r} ({option})")
    config[path[-1]] = value


def _same(given: Any, value: Any) -> bool:
    """Equality in which a JSON list equals a tuple."""
    return list(given) == list(value) if isinstance(given, list) and isinstance(value, tuple) else given == value


def _check_optimizer(section: dict[str, Any] | None, plan: EnginePlan, conflicts: list[str]) -> None:
    if section is None:
        return
    if section.get("type") not in plan.optim.optimizer().deepspeed_types:
        conflicts.append(
            f"optimizer.type is {section.get('type')!r}, but the run uses {plan.optim.name!r} (--optimizer); remove "
            "the section"
        )
    known = {name: getattr(plan.optim, name) for name in ("lr", "betas", "eps", "weight_decay")}
    for name, given in section.get("params", {}).items():
        if name in known and given != "auto" and not _same(given, known[name]):
            conflicts.append(f"optimizer.params.{name} is {given!r}, but the run uses {known[name]!r} (--optim)")


def _check_scheduler(section: dict[str, Any] | None, plan: EnginePlan, conflicts: list[str]) -> None:
    if section is None:
        return
    kind, params = section.get("type"), section.get("params", {})
    if SCHEDULERS.get(str(kind)) != plan.optim.schedule:
        schedule = f" ({SCHEDULERS[kind]})" if kind in SCHEDULERS else ""
        conflicts.append(
            f"scheduler.type is {kind!r}{schedule}, but the run uses {plan.optim.schedule!r} (--schedule); "
            "remove the section"
        )
    known = {
        "warmup_num_steps": plan.warmup_steps,
        "total_num_steps": plan.total_steps,
        "warmup_max_lr": plan.optim.lr,
        "warmup_min_lr": 0,
    }
    for name, given in params.items():
        if name in known and given != "auto" and given != known[name]:
            conflicts.append(f"scheduler.params.{name} is {given!r}, but the run uses {known[name]!r} (--optim)")


def _fill_zero(config: dict[str, Any], plan: EnginePlan) -> None:
    """Fill ZeRO's "auto" sizes as Hugging Face's integration does, and set what an external optimizer needs."""
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
        # same results in less memory; DeepSpeed's fp16 optimizer of stage 0 divides gradients by a loss scale that
        # was never applied, and starts AdamW with a step of zero gradients
        zero["stage"] = 1
    if offloads_optimizer(config):
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    if plan.precision == "bf16" and plan.accumulation > 1 and zero.get("stage", 0) >= 1:
        # in bf16, a micro-batch's gradient below 1/256 of the sum so far is rounded away
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")


def _set_up_optimizer(config: dict[str, Any], plan: EnginePlan, where: str) -> None:
    """Add the settings that the optimizer needs; ValueError if it cannot run under this configuration."""
    optimizer = plan.optim.optimizer()
    if offloads_optimizer(config) and not optimizer.supports_offload:
        raise ValueError(
            f"{where} offloads optimizer states, which optim.name {optimizer.name} does not support: remove "
            "zero_optimization.offload_optimizer, or set --optimizer adamw"
        )
    if zero_stage(config) > 0:
        for name, value in optimizer.deepspeed_settings.items():
            config.setdefault(name, value)


def _add_monitors(config: dict[str, Any], plan: EnginePlan) -> None:
    """Add a section for each requested monitor that the file lacks; ValueError if its package is not installed."""
    for monitor in plan.report_to:
        section: dict[str, Any] = {"enabled": True}
        if monitor == "wandb":
            section |= {"project": "llm2clip"} | ({"group": plan.run_name} if plan.run_name else {})
        else:
            section |= {"output_path": str(Path(plan.output_dir) / "monitor"), "job_name": plan.run_name or monitor}
        config.setdefault(MONITORS[monitor], section)
    for package in ("tensorboard", "wandb"):  # DeepSpeed checks only after the models are loaded
        if config.get(package, {}).get("enabled") and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"the run reports to {package}, which is not installed: pip install {package}, or remove it from "
                "--report_to (and from the DeepSpeed configuration)"
            )


def _paths_with_auto(value: Any, path: str = "") -> list[str]:
    """Dotted paths of the remaining "auto" values."""
    if value == "auto":
        return [path]
    if isinstance(value, dict):
        return [hit for name, item in value.items() for hit in _paths_with_auto(item, f"{path}.{name}".lstrip("."))]
    return []
