"""Settings of a training run: what stages share, and how a resumed run's are compared with its checkpoint's.

Standard library only.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip_plugin.options import nearest

# Fields that may differ when a run resumes: they change where, how often and on what hardware it runs, not what it
# learns.
IGNORED_ON_RESUME = (
    "output_dir",
    "resume",
    "allow_changed",
    "dry_run",
    "deepspeed",
    "evaluation",
    "plan",
    "tower.architecture",
    "data.cache",
    "data.validation",
    "data.validation_cache",
    "data.clip_cache",
    "data.read.cache_folder",
    "data.read.cache_gb",
    "loss.block",
    "contrast.length_groups",
    "train.save_steps",
    "train.save_minutes",
    "train.save_total_limit",
    "train.save_fallback_dir",
    "train.eval_steps",
    "train.eval_on_start",
    "train.logging_steps",
    "train.report_to",
    "train.profile_steps",
    "train.profile_all_ranks",
    "train.dataloader_num_workers",
    "train.dataloader_prefetch_mb",
    "train.tf32",
    "train.full_determinism",
    "train.skip_bad_batches",
    "train.communication_data_type",
    "train.ddp_timeout",
    "train.straggler_seconds",
    "train.gradient_checkpointing",
    "train.torch_compile",
)

# Initial values, which a resumed run takes from its checkpoint; they decide what is learned nevertheless.
INITIAL = ("dual.logit_scale_init", "dual.projection_init_std")

# Of the stages' commands, as options.Command takes them. An explicit length or warm-up wins over a recipe's.
REPLACES = {
    "train.num_train_epochs": "train.max_steps",
    "optim.warmup_ratio": "optim.warmup_steps",
    "optim.warmup_steps": "optim.warmup_ratio",
}
NEEDS = {"train.num_train_epochs": "not train.max_steps", "plan": "dry_run"}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What the configurations of both training stages share."""

    output_dir: str = "runs/run"  # checkpoints, metrics.jsonl, run.json and, at the end, what was trained
    deepspeed: str = ""  # DeepSpeed JSON (scripts/zero*.json, or LLaVA's own); "": ZeRO-1, with fp32 ZeRO-0
    resume: str = "auto"  # auto: this run's newest checkpoint, if any | never | a checkpoint or run folder
    allow_changed: tuple[str, ...] = ()  # fields that may differ from the checkpoint's, e.g. optim.lr or all of optim
    dry_run: bool = False  # print steps, memory and commands, then exit; needs no weights


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of nested dicts; a list is a leaf, and a tuple becomes a list."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from flat(item, f"{path}.{name}" if path else name)
    else:
        yield path, _plain(value)


def _plain(value: Any) -> Any:
    """As JSON returns it, numbers as floats: 4 and 4.0 are the same setting."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return {name: _plain(item) for name, item in value.items()} if isinstance(value, dict) else value


def flat_essentials(config: dict[str, Any], allowed: tuple[str, ...] = ()) -> dict[str, Any]:
    """The leaves that decide what is learned, without the ``allowed`` ones."""
    skipped = (*IGNORED_ON_RESUME, *allowed)
    return {
        name: value
        for name, value in flat(config)
        if not any(name == skip or name.startswith(f"{skip}.") for skip in skipped)
    }


def refuse_changes(saved: dict[str, Any], now: dict[str, Any], allowed: tuple[str, ...], *, where: str) -> None:
    """Raise ValueError naming every field that decides what is learned and differs from the checkpoint's."""
    known = {name for settings in (now, saved) for name, _ in flat(settings)}
    for name in allowed:
        if not any(path == name or path.startswith(f"{name}.") for path in known):
            raise ValueError(f"unknown field {name!r} in --allow-changed{nearest(name, sorted(known))}")
    old, new = (flat_essentials(settings, (*allowed, *INITIAL)) for settings in (saved, now))
    changed = {
        name: f"{old.get(name, 'absent')!r} in the checkpoint, {new.get(name, 'absent')!r} in this run"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, "absent") != new.get(name, "absent")
    }
    if changed:
        listed = "\n  ".join(f"{name}: {values}" for name, values in changed.items())
        raise ValueError(
            f"{where} was saved with other settings:\n  {listed}\n"
            f"restore them, choose another --output, or accept the changes with --allow-changed {' '.join(changed)}"
        )


# What the stages' commands share.


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks, from the launcher's environment; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def plan_or_train(dry_run: bool, plan: Callable[[], str], train: Callable[[], Path], result: str) -> int:
    """Print the plan, or train and print where the ``result`` is, in both cases on rank 0; returns exit status 0."""
    first_rank = rank_and_world()[0] == 0
    if dry_run:
        if first_rank:
            print(plan(), flush=True)
        return 0
    path = train()
    if first_rank:
        print(f"{result}: {path}")
    return 0


# What a dry run assumes; read without torch.


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What --dry-run assumes while there is no data."""

    images: int = 15_000_000  # captioned images, or pairs of texts; the size of the paper's smaller set
    gpu_gib: float = 80.0  # a GPU's memory in GiB: the plan has the largest micro-batches that fit

    def __post_init__(self) -> None:
        if self.images < 1 or self.gpu_gib <= 0:
            raise ValueError(f"plan.images {self.images} and gpu_gib {self.gpu_gib} must both be above 0")


# The LLMs that the paper (LLM2CLIP, arXiv 2411.04997) trained with, for recipes and plans.


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """An LLM of the paper, before and after stage 1."""

    base: str  # Hub id of the LLM that stage 1 starts from
    released: str  # Hub id of the LLM that the authors fine-tuned
    preset: str  # how the released one reads a caption (llm2clip embed --preset)
    width: int  # of an embedding, and so of a cache


TEACHERS = {
    "llama-1b": Teacher(
        base="meta-llama/Llama-3.2-1B-Instruct",
        released="microsoft/LLM2CLIP-Llama-3.2-1B-Instruct-CC-Finetuned",
        preset="llm2clip-llama3",
        width=2048,
    ),
    "llama-8b": Teacher(
        base="meta-llama/Meta-Llama-3-8B-Instruct",
        released="microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned",
        preset="llm2clip-llama3",
        width=4096,
    ),
}
