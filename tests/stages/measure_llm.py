"""Growth of a process's memory in a real step of stage 1: ``measure_llm.py LLM DTYPE CHECKPOINTING TEXTS TOKENS``.

The LLM with its adapter as it trains, on random texts of one length (one a token shorter, for a mask) in the step's
groups. Prints bytes; the weights and the adapter's gradients were there before.
"""

from __future__ import annotations

import dataclasses
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


def main(llm: str, dtype: str, checkpointing: str, texts: str, tokens: str) -> None:
    torch.set_num_threads(1)
    config = FinetuneConfig(encoder=EncoderConfig(llm=llm, compute_dtype=dtype))
    train = dataclasses.replace(config.train, gradient_checkpointing=checkpointing == "True")
    config = dataclasses.replace(config, train=train)
    module = trained_module(CaptionEncoder(config.encoder, "cpu", trainable_adapter=True), config)
    adam = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
    for count in (int(texts),) * 2:  # the first step also makes what the libraries keep
        before = peak(reset=True)
        features, scale = module(*tensors(count, int(tokens)))
        logits = scale.exp() * features[::2] @ features[1::2].T
        torch.nn.functional.cross_entropy(logits, torch.arange(count // 2)).backward()
    print(peak() - before)
    adam.step()


if __name__ == "__main__":
    main(*sys.argv[1:])
