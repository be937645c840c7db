"""The tokens around a caption, and captions as token ids in them.

This file stands alone: it is saved with an embedder that is exported to sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CAPTION = "{caption}"  # placeholder in a chat template


@dataclass(frozen=True)
class Frame:
    """The tokens around every caption: [bos] head caption tail."""

    head: tuple[int, ...]  # before the caption, BOS included
    tail: tuple[int, ...]  # after it
    # the prompt's trailing spaces, tokenized with the caption's first word, as in "Query: " +
    # caption
    lead: str
    has_bos: bool  # whether head starts with the beginning-of-text token


def build_frame(tokenizer, template: str, prompt: str) -> Frame:
    """The tokens around a caption, from a literal template ("" for none) and a prompt.

    Without a template these are the tokenizer's special tokens. A template replaces the special
    tokens at the end, and keeps those at the beginning unless it starts with them itself. Spaces at
    the end of the prompt are tokenized with the caption, as in running text: without the one that a
    SentencePiece tokenizer puts before every text itself.
    """

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    plain = ids_of("a")
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]
    starts = range(len(framed))
    start = next(i for i in starts if framed[i : i + len(plain)] == plain)
    begin = framed[:start]
    end = framed[start + len(plain) :]
    before, _, after = template.partition(CAPTION)
    if template and begin and before.startswith(tokenizer.decode(begin)):
        begin = []  # the template contains them
    text = before + prompt
    stripped = text.rstrip(" ")
    lead = text[len(stripped) :]
    adds_space = ids_of(text + "a")[-len(plain) :] == plain
    if adds_space:
        lead = lead[1:]
    head = begin + ids_of(stripped)
    tail = ids_of(after) if template else end
    bos_tokens = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    has_bos = bool(head) and head[0] in bos_tokens
    return Frame(tuple(head), tuple(tail), lead, has_bos)


def tokenize(
    tokenizer, frames: Sequence[Frame], captions: Sequence[str], max_tokens: int
) -> tuple[list[list[int]], int]:
    """Token ids of each caption in its frame, and how many captions were truncated to
    ``max_tokens``.

    The spelling of a special token ("</s>") in a caption is plain text. Raises ValueError for a
    blank caption, and if a frame alone fills ``max_tokens``.
    """
    room = [max_tokens - len(frame.head) - len(frame.tail) for frame in frames]
    if min(room, default=1) < 1:
        used = max_tokens - min(room)
        raise ValueError(
            f"max_tokens is {max_tokens}, but prompt and template use {used}; "
            "raise it or shorten them"
        )
    for index, caption in enumerate(captions):
        if not caption.strip():
            raise ValueError(f"caption {index} of {len(captions)} is blank")
    if not captions:
        return [], 0
    framed_captions = zip(frames, captions, strict=True)
    texts = [frame.lead + caption for frame, caption in framed_captions]
    output = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, verbose=False
    )
    rows: list[list[int]] = []
    truncated = 0
    for frame, ids, most in zip(frames, output["input_ids"], room, strict=True):
        rows.append([*frame.head, *ids[:most], *frame.tail])
        if len(ids) > most:
            truncated += 1
    return rows, truncated
