#!/usr/bin/env python3
"""Settings by GPU memory: which micro-batch, gradient checkpointing and ZeRO stage fit, by --dry-run's own arithmetic.

    scripts/gpu_settings.py            print the tables of docs/gpu-memory.md (a minute or two)
    scripts/gpu_settings.py --write    put them into the page

None of the settings changes what is learned: the global batch is the recipe's. Of those that fit, the one with the
least computation is shown. A step without checkpointing whose rank sees its part of the batch at once costs one forward
pass and a backward pass of two; gradient checkpointing adds a forward pass, and so does gradient caching (a micro-batch
smaller than the rank's part).
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llm2clip_plugin.stages.llm.command import ASSUMED_TOKENS, DataSize
from llm2clip_plugin.stages.llm.command import step_memory as llm_memory
from llm2clip_plugin.stages.llm.config import llm_recipe
from llm2clip_plugin.stages.plan import FILLED, GIB
from llm2clip_plugin.stages.tower.command import step_memory as tower_memory
from llm2clip_plugin.stages.tower.config import recipe
from llm2clip_plugin.text.config import apply_preset
from llm2clip_plugin.text.llm import llm_config
from llm2clip_plugin.train.memory import StepMemory, rank_bytes
from llm2clip_plugin.train.model import shape_dual

PAGE = Path(__file__).resolve().parents[1] / "docs" / "gpu-memory.md"
BEGIN, END = "<!-- computed: {} -->", "<!-- end -->"
GPU_GIB = (24, 40, 80)
GPUS = (1, 8)
TOWERS = {
    "openai_b16": "B/16, 224 px",
    "openai_l14_224": "L/14, 224 px",
    "openai_l14_336": "L/14, 336 px",
    "siglip2_so400m_224": "SO400M/14, 224 px",
    "eva02_bige14": "bigE/14, 224 px",
}
LLMS = ("llama-1b", "llama-8b")
TOKENS = (ASSUMED_TOKENS, 512)
STAGES = ("1", "2", "3", "2_offload")  # scripts/zeroN.json, the simplest first
SMALL = 16  # pairs: a smaller micro-batch leaves a GPU idle, so it is only taken if nothing else fits


@dataclass(frozen=True, kw_only=True, order=True)
class Setting:
    """One that fits; the smallest is the best."""

    small: bool
    offload: bool  # optimizer states in the host's memory, slower than any computation saved
    passes: int  # of a step, counted in forward passes
    stage: int  # index of STAGES
    smaller: int  # minus the micro-batch
    checkpointing: bool
    size: float  # bytes of a GPU

    def __str__(self) -> str:
        checkpointing = "on" if self.checkpointing else "off"
        return f"{-self.smaller}, {checkpointing}, {STAGES[self.stage]} ({self.size / GIB:.0f}; {self.passes})"


def best_setting(
    memory: dict[bool, StepMemory], *, world: int, global_batch: int, gpu_gib: float, stages: int = len(STAGES)
) -> Setting | None:
    """The least computation that fits into a GPU; ``memory``: with and without gradient checkpointing."""
    local = global_batch // world
    sizes = [size for size in range(1, local + 1) if local % size == 0]
    fitting = []
    for checkpointing, each in memory.items():
        for index, stage in enumerate(STAGES[:stages]):
            zero = {"stage": int(stage[0]), "overlap_comm": True}
            if stage.endswith("offload"):
                zero["offload_optimizer"] = {"device": "cpu"}
            for size in sizes:
                parts = rank_bytes(each, zero, world=world, global_batch=global_batch, micro_batch=size)
                total = sum(parts.values())
                if total <= FILLED * gpu_gib * GIB:
                    fitting.append(
                        Setting(
                            small=size < min(SMALL, local),
                            offload="offload_optimizer" in zero,
                            passes=3 + checkpointing + (size < local),
                            stage=index,
                            smaller=-size,
                            checkpointing=checkpointing,
                            size=total,
                        )
                    )
    return min(fitting, default=None)


def tower_sizes(name: str) -> dict[bool, StepMemory]:
    """A recipe's memory with and without gradient checkpointing, with the embeddings of an LLM of 8B."""
    config = recipe(f"{name}/llama-8b")
    return {
        flag: tower_memory(
            dataclasses.replace(config, train=dataclasses.replace(config.train, gradient_checkpointing=flag)),
            shape_dual(config.tower, config.dual),
        )
        for flag in (False, True)
    }


def llm_sizes(name: str, tokens: int, *, four_bit: bool) -> dict[bool, StepMemory]:
    """The same for stage 1, with texts of a length."""
    config = llm_recipe(name)
    encoder = dataclasses.replace(apply_preset(config.encoder), load_in_4bit=four_bit)
    size = DataSize(pairs=1, texts=2, lengths=(tokens,), found=(), assumed=())
    sizes = {}
    for flag in (False, True):
        changed = dataclasses.replace(
            config, encoder=encoder, train=dataclasses.replace(config.train, gradient_checkpointing=flag)
        )
        sizes[flag] = llm_memory(changed, llm_config(encoder), size, [tokens])
    return sizes


def cells(memory: dict[bool, StepMemory], world: int, global_batch: int, stages: int = len(STAGES)) -> list[str]:
    """One for each size of GPU."""
    found = [
        best_setting(memory, world=world, global_batch=global_batch, gpu_gib=gib, stages=stages) for gib in GPU_GIB
    ]
    return [str(setting) if setting else "does not fit" for setting in found]


def tower_row(name: str) -> Iterator[str]:
    """The lines of a recipe, one for each number of GPUs."""
    memory = tower_sizes(name)
    for world in GPUS:
        yield row(f"`{name}`: {TOWERS[name]}", world, *cells(memory, world, recipe(name).train.global_batch))


def llm_row(name: str, tokens: int, *, four_bit: bool) -> Iterator[str]:
    """The lines of an LLM with texts of a length, one for each number of GPUs."""
    stages = 2 if four_bit else 3  # ZeRO-3 can't partition 4-bit weights; an adapter needs no offloading
    memory, kind = llm_sizes(name, tokens, four_bit=four_bit), "QLoRA" if four_bit else "LoRA"
    for world in GPUS:
        batch = llm_recipe(name).train.global_batch
        yield row(f"`{name}`, {kind}, {tokens} tokens", world, *cells(memory, world, batch, stages))


def row(*fields: object) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, fields))} |"


def tables() -> dict[str, str]:
    """Name -> table."""
    heads = {
        name: [row(name, "GPUs", *(f"{gib} GiB" for gib in GPU_GIB)), "|---" * 5 + "|"] for name in ("recipe", "LLM")
    }
    towers = [line for name in TOWERS for line in tower_row(name)]
    llms = [
        line
        for name in LLMS
        for four_bit in (False, True)
        for tokens in TOKENS
        for line in llm_row(name, tokens, four_bit=four_bit)
    ]
    return {"towers": "\n".join([*heads["recipe"], *towers]), "LLMs": "\n".join([*heads["LLM"], *llms])}


def main() -> None:
    """Print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    write, text = parser.parse_args().write, PAGE.read_text() if PAGE.is_file() else ""
    for name, table in tables().items():
        begin = BEGIN.format(name)
        if write:
            start, _, rest = text.partition(begin)
            _, end, rest = rest.partition(END)
            if not end:
                sys.exit(f"error: {PAGE} has no {begin!r} followed by {END!r}")
            text = f"{start}{begin}\n{table}\n{end}{rest}"
        else:
            print(f"{table}\n")
    if write:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
