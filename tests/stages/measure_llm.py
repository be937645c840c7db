"""Growth of a process's memory in a real step of stage 1: ``measure_llm.py LLM TEXTS TOKENS``.

The LLM with its adapter as it trains, on random texts of one length (one a token shorter, for a mask) in the step's
groups. Prints bytes by dtype and gradient checkpointing; the weights and the adapter's gradients were there before.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import sys
from pathlib import Path

import torch

from llm2clip_plugin.stages.llm.config import FinetuneConfig
from llm2clip_plugin.stages.llm.run import trained_module
from llm2clip_plugin.text.contrast import ContrastConfig, equal_parts
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.settings import EncoderConfig


def peak(*, reset: bool = False) -> int:
    """Bytes that the process has had at most, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def tensors(texts: int, tokens: int) -> list[torch.Tensor]:
    """The module's input: four tensors a group."""
    found: list[torch.Tensor] = []
    for part in equal_parts(range(texts), ContrastConfig().length_groups):
        attended = torch.ones(len(part), tokens, dtype=torch.int64)
        attended[-1, -1] = 0
        positions = torch.arange(tokens).expand(len(part), tokens)
        found += [torch.randint(5, 300, (len(part), tokens)), attended, positions, attended.bool()]
    return found


def growth(llm: str, dtype: str, checkpointing: bool, texts: int, tokens: int) -> int:
    """Bytes that the second step adds; the first also makes what the libraries keep."""
    config = FinetuneConfig(encoder=EncoderConfig(llm=llm, compute_dtype=dtype))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, gradient_checkpointing=checkpointing))
    module = trained_module(CaptionEncoder(config.encoder, "cpu", trainable_adapter=True), config)
    before = 0
    for _ in range(2):
        before = peak(reset=True)
        features, scale = module(*tensors(texts, tokens))
        logits = scale.exp() * features[::2] @ features[1::2].T
        torch.nn.functional.cross_entropy(logits, torch.arange(texts // 2)).backward()
    return peak() - before


def main(llm: str, texts: str, tokens: str) -> None:
    torch.set_num_threads(1)
    cases = list(itertools.product(("float32", "bfloat16"), (False, True)))
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:  # nothing is left of the one before
        grown = pool.starmap(growth, [(llm, *case, int(texts), int(tokens)) for case in cases], chunksize=1)
    print(
        json.dumps(
            {f"{dtype} {checkpointing}": size for (dtype, checkpointing), size in zip(cases, grown, strict=True)}
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
