"""Captions to tokens: template and prompt around each, truncation, batches by token budget.

Shape letters: B captions of a batch, T tokens of its longest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from llm2clip_plugin.text.config import CAPTION

PROBE_TEXT = "A red-and-white café sign, 3:45 pm; 红色的猫 кот ねこ قط 🐈"  # its token ids identify a tokenizer
TEMPLATE_DATE = "26 Jul 2024"  # Llama 3's template contains the date; an embedding must not depend on the day


@dataclass(frozen=True)
class Frame:
    """The tokens around every caption: [bos] head caption tail."""

    head: tuple[int, ...]  # before the caption, BOS included
    tail: tuple[int, ...]  # after it
    lead: str  # the prompt's trailing spaces, tokenized with the caption's first word, as in "Query: " + caption
    has_bos: bool  # whether head starts with the beginning-of-text token

    @property
    def size(self) -> int:
        """Number of tokens around the caption."""
        return len(self.head) + len(self.tail)

    def caption_budget(self, max_tokens: int) -> int:
        """Number of tokens left for a caption; raises ValueError if there are none."""
        if max_tokens <= self.size:
            raise ValueError(
                f"prompt and template use {self.size} tokens and max_tokens is {max_tokens}, which leaves no room for "
                "the caption; raise max_tokens or shorten them"
            )
        return max_tokens - self.size


@dataclass(frozen=True)
class Batch:
    """A padded batch of token ids, and which of them are pooled."""

    input_ids: torch.Tensor  # (B, T) int64
    attention_mask: torch.Tensor  # (B, T) int64, 1 on tokens
    position_ids: torch.Tensor  # (B, T) int64, from 0 at each caption's first token on either padding side
    pool_mask: torch.Tensor  # (B, T) bool, True on tokens that are pooled

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``."""
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))


def literal_template(tokenizer, chat_template: str) -> str:
    """The chat template as a text with {caption} in it; "" for none.

    Raises ValueError if the tokenizer has no chat template, or one that changes the user's text.
    """
    if chat_template != "user":
        return chat_template
    if not tokenizer.chat_template:
        raise ValueError(
            f"chat_template is 'user', but the tokenizer of {tokenizer.name_or_path} has no chat template; "
            f"set one, such as '<|user|>{CAPTION}<|end|>', or leave it empty"
        )
    turn = [{"role": "user", "content": CAPTION}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, date_string=TEMPLATE_DATE)
    if text.count(CAPTION) != 1:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} must contain the user's text once, unchanged: {text!r}"
        )
    return text


def build_frame(tokenizer, template: str, prompt: str) -> Frame:
    """The tokens around a caption, from a literal template ("" for none) and a prompt.

    Without a template these are the tokenizer's special tokens. A template replaces the special tokens at the end, and
    keeps those at the beginning unless it starts with them itself. Spaces at the end of the prompt are tokenized with
    the caption, as in running text.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]
    start = next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
    begin, end = framed[:start], framed[start + len(plain) :]
    before, _, after = template.partition(CAPTION)
    if template and begin and before.startswith(tokenizer.decode(begin)):
        begin = []  # the template contains them
    text = before + prompt
    lead = text[len(text.rstrip(" ")) :]
    head = begin + tokenizer(text[: len(text) - len(lead)], add_special_tokens=False)["input_ids"]
    tail = tokenizer(after, add_special_tokens=False)["input_ids"] if template else end
    has_bos = bool(head) and head[0] in {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    return Frame(tuple(head), tuple(tail), lead, has_bos)


def query_frames(tokenizer, template: str, prompts: Sequence[str]) -> list[Frame]:
    """The frame of each prompt; equal prompts share one."""
    frames = {prompt: build_frame(tokenizer, template, prompt) for prompt in dict.fromkeys(prompts)}
    return [frames[prompt] for prompt in prompts]


def tokenize(
    tokenizer, frames: Sequence[Frame], captions: Sequence[str], max_tokens: int
) -> tuple[list[list[int]], int]:
    """Token ids of each caption in its frame, and how many captions were truncated to ``max_tokens``.

    The spelling of a special token ("</s>") in a caption is plain text. Raises ValueError for a blank caption, and if
    a frame alone fills ``max_tokens``.
    """
    budgets = [frame.caption_budget(max_tokens) for frame in frames]
    for index, caption in enumerate(captions):
        if not caption.strip():
            raise ValueError(f"caption {index} of {len(captions)} is blank")
    if not captions:
        return [], 0
    untruncated = token_ids(tokenizer, frames, captions)
    framed = zip(frames, budgets, untruncated, strict=True)
    rows = [[*frame.head, *ids[:budget], *frame.tail] for frame, budget, ids in framed]
    return rows, sum(len(ids) > budget for ids, budget in zip(untruncated, budgets, strict=True))


def token_ids(tokenizer, frames: Sequence[Frame], captions: Sequence[str]) -> list[list[int]]:
    """Token ids of each caption, without its frame and not truncated; at least one caption."""
    texts = [frame.lead + caption for frame, caption in zip(frames, captions, strict=True)]
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def collate(
    rows: Sequence[Sequence[int]], frames: Sequence[Frame], *, pad_id: int, include_bos: bool, side: str = "right"
) -> Batch:
    """Pad rows of token ids, each with its frame, to one (B, T) batch on ``side`` ("left" or "right").

    The tokens of the frame's head are not pooled, except BOS with ``include_bos``.
    """
    longest = max(map(len, rows))
    shape = (len(rows), longest)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    pool_mask = torch.zeros(shape, dtype=torch.bool)
    for index, (ids, frame) in enumerate(zip(rows, frames, strict=True)):
        start = 0 if side == "right" else longest - len(ids)
        stop = start + len(ids)
        input_ids[index, start:stop] = torch.tensor(ids)
        attention_mask[index, start:stop] = 1
        position_ids[index, start:stop] = torch.arange(len(ids))
        pool_mask[index, start + len(frame.head) : stop] = True
        if frame.has_bos and include_bos:
            pool_mask[index, start] = True
    return Batch(input_ids, attention_mask, position_ids, pool_mask)


def length_batches(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Batches of indices, longest rows first, each of at most ``tokens_per_batch`` tokens, padding included.

    Longest first: a lack of memory shows at once, and the estimate of the time left is not too low.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        count = max(1, tokens_per_batch // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count


def tokenizer_identity(tokenizer) -> str:
    """16 hexadecimal characters that hash the token ids of a fixed text, so a re-saved tokenizer keeps its identity."""
    ids = tokenizer(PROBE_TEXT)["input_ids"]
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]
