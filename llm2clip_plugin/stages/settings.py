"""What the configurations of both training stages share. Read without torch."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llm2clip_plugin.hashes import canonical_json, sha256_text
from llm2clip_plugin.options import setting
from llm2clip_plugin.stages.resume import flat_essentials


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What the configurations of both training stages share."""

    output_dir: str = setting(
        "runs/run",
        help="checkpoints, metrics.jsonl, run.json and, at the end, what was trained",
        option="output",
        learned=False,
        per_host=True,
    )
    deepspeed: str = setting(
        "",
        help="DeepSpeed JSON; default ZeRO-1, or ZeRO-0 with fp32",
        learned=False,
        per_host=True,
    )
    resume: str = setting(
        "auto",
        help="auto: this run's newest checkpoint, if any | never | a checkpoint or run folder",
        learned=False,
        per_host=True,
    )
    allow_changed: tuple[str, ...] = setting(
        (),
        help="fields that may differ from the checkpoint's, e.g. optim.lr or all of optim",
        learned=False,
    )
    dry_run: bool = setting(
        False,
        help="print steps and memory, then exit; needs neither weights nor data",
        learned=False,
    )

    @property
    def hash(self) -> str:
        """SHA-256 over the fields that decide what is learned."""
        return sha256_text(
            canonical_json(flat_essentials(type(self), dataclasses.asdict(self)))
        )


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks, from the launcher's environment; (0, 1) without
    a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def plan_or_train(
    dry_run: bool, plan: Callable[[], str], train: Callable[[], Path], result: str
) -> int:
    """Print the plan, or train and print where the ``result`` is, in both cases on rank 0; returns
    exit status 0."""
    first_rank = rank_and_world()[0] == 0
    if dry_run:
        if first_rank:
            print(plan(), flush=True)
        return 0
    path = train()
    if first_rank:
        print(f"{result}: {path}")
    return 0


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What --dry-run assumes while there is no data."""

    images: int = setting(
        15_000_000,
        help="captioned images, or pairs of texts; the size of the paper's smaller set",
        option="assumed-samples",
    )
    gpu_gib: float = setting(
        80.0,
        help="a GPU's memory in GiB: the plan has the largest micro-batches that fit",
        unit="GiB",
    )


class Teacher(NamedTuple):
    """An LLM that the paper (LLM2CLIP, arXiv 2411.04997) trained with, before and after stage 1."""

    base: str  # Hub id of the LLM that stage 1 starts from
    released: str  # Hub id of the LLM that the authors fine-tuned
    width: int  # of an embedding, and so of a cache


TEACHERS = {
    "llama-1b": Teacher(
        "meta-llama/Llama-3.2-1B-Instruct",
        "microsoft/LLM2CLIP-Llama-3.2-1B-Instruct-CC-Finetuned",
        2048,
    ),
    "llama-8b": Teacher(
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned",
        4096,
    ),
}
