"""``--version chatml_direct`` and ``mpt``: labels for LLaVA's training of language models that speak ChatML.

LLaVA's ``preprocess_mpt`` counts a token too few in each round, takes the difference for a tokenization mismatch, and
ignores all labels of the sample: nothing would be learned. `hook` gives its training program `preprocess` instead.
"""

# LLaVA may be in an environment of its own, not where types are checked.
# pyright: reportMissingImports=false

import functools
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

PROGRAMS = ("__main__", "llava.train.train")  # as a program, and imported by train_mem.py
Turns = list[dict[str, str]]


def complete_trainer(module: ModuleType) -> None:
    """Make ``LLaVATrainer(...)`` give the program that it is called by `preprocess`; no import hook sees ``__main__``.

    The program has made its dataset by then, which prepares a sample when it is read.
    """
    trainer = module.LLaVATrainer
    original = trainer.__init__
    file = os.path.join(os.path.dirname(str(module.__file__)), "train.py")

    @functools.wraps(original)
    def __init__(self: Any, *arguments: Any, **options: Any) -> None:  # noqa: N807 - is set as that method
        for program in map(sys.modules.get, PROGRAMS):
            if os.path.realpath(getattr(program, "__file__", None) or "") == os.path.realpath(file):
                setattr(program, "preprocess_mpt", preprocess)  # noqa: B010 - a name of LLaVA's module
        original(self, *arguments, **options)

    trainer.__init__ = __init__


def preprocess(sources: list[Turns], tokenizer: Any, has_image: bool = False) -> dict[str, list[torch.Tensor]]:
    """Token ids and labels of conversations, (T,) each, in the template of ``--version``.

    An answer is learned with the ``<|im_end|>`` that ends it; every other label is LLaVA's IGNORE_INDEX.
    """
    from llava.mm_utils import tokenizer_image_token

    def ids_of(text: str) -> list[int]:
        made: Any = tokenizer_image_token(text, tokenizer) if has_image else tokenizer(text).input_ids
        return made

    rows = [labeled(turns, ids_of) for turns in sources]
    return {"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]}


def labeled(turns: Turns, ids_of: Callable[[str], list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of one conversation; turns before the first question are left out, as in LLaVA's templates."""
    from llava import conversation
    from llava.constants import IGNORE_INDEX

    template = conversation.default_conversation.copy()
    roles, template.messages = template.roles, []
    prefixes = []  # of each answer: the ids before it, and those through its end
    for turn in turns if turns[0]["from"] == "human" else turns[1:]:
        role = roles[len(template.messages) % 2]
        if turn["from"] != ("human" if role == roles[0] else "gpt"):
            raise ValueError(f"turns of a conversation must alternate human, gpt, ...; got {turns}")
        template.append_message(role, None)
        before = ids_of(template.get_prompt())
        template.messages[-1][1] = turn["value"]
        if role == roles[1]:
            prefixes.append((before, ids_of(template.get_prompt())))
    ids = ids_of(template.get_prompt())
    labels = [IGNORE_INDEX] * len(ids)
    for before, through in prefixes:
        # a tokenizer may join the last character before the answer with its first one
        start, end = shared(before, ids), shared(through, ids)
        labels[start:end] = ids[start:end]
    return torch.tensor(ids), torch.tensor(labels)


def shared(prefix: list[int], ids: list[int]) -> int:
    """How many of the first ids both have."""
    differ = (place for place, (a, b) in enumerate(zip(prefix, ids, strict=False)) if a != b)
    return next(differ, min(len(prefix), len(ids)))
