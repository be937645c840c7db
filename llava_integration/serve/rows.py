"""LLaVA's JSON as batches of transformers' Trainer, with the processor of an exported or built
model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class LlavaRows:
    """A data collator: only answers are learned, as in LLaVA."""

    processor: Any  # transformers'
    images: str | Path  # the folder of the rows' images

    def chat(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Messages of a row, the image before the first question; an answer before that is left
        out, as in LLaVA."""
        messages = []
        turns = row["conversations"]
        if turns[0]["from"] != "human":
            turns = turns[1:]
        for turn in turns:
            role = "user" if turn["from"] == "human" else "assistant"
            text = turn["value"].replace("<image>", "").strip()
            messages.append({"role": role, "content": [{"type": "text", "text": text}]})
        if "image" in row:
            path = str(Path(self.images) / row["image"])
            messages[0]["content"].insert(0, {"type": "image", "path": path})
        return messages

    def encode(self, chats: list[Any], *, side: str = "right", **options: Any) -> Any:
        """Token ids, padded on a side, and pixels; ``options`` of ``apply_chat_template``."""
        padded = {"padding": True, "padding_side": side}
        options |= {
            "tokenize": True,
            "return_dict": True,
            "return_tensors": "pt",
            "processor_kwargs": padded,
        }
        return self.processor.apply_chat_template(chats, **options)

    def tokens(self, chat: list[Any], row: list[int], **options: Any) -> list[int]:
        """Token ids of a chat, without reading its image again, whose tokens are those of ``row``,
        the whole."""
        text = self.processor.apply_chat_template([chat], tokenize=False, **options)[0]
        tokenizer = self.processor.tokenizer
        image = getattr(self.processor, "image_token_id", -1)
        # as transformers' processors ask
        begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        ids = tokenizer(text, add_special_tokens=not begun)["input_ids"]
        tokens = []
        for token in ids:
            tokens += [token] * (row.count(image) if token == image else 1)
        return tokens

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch; labels are -100 except for the answers and the tokens that end them. Raises
        ValueError for a chat template that writes otherwise what is before an answer once that is
        there."""
        chats = [self.chat(row) for row in rows]
        batch = self.encode(chats)
        labels = torch.full_like(batch["input_ids"], -100)
        ends: list[tuple[int, int, int]] = []  # row, place and token of an answer's end
        ids = batch["input_ids"].tolist()
        for number, (chat, row) in enumerate(zip(chats, ids, strict=True)):
            for turn, message in enumerate(chat):
                if message["role"] != "assistant":
                    continue
                prompt = self.tokens(chat[:turn], row, add_generation_prompt=True)
                start = len(prompt)
                if row[:start] != prompt:
                    tail = self.processor.decode(prompt[-8:])
                    raise ValueError(
                        f"the chat template writes {tail!r} before an answer alone; "
                        "build the model with another (--chat-template FILE)"
                    )
                answer = self.tokens(chat[: turn + 1], row)[start:]
                end = start + answer_length(answer, row[start:])
                labels[number, start:end] = batch["input_ids"][number, start:end]
                if self.has_no_end(chat[: turn + 1]):
                    token = self.next_turn(chat[: turn + 1], row, end)
                    ends.append((number, end, token))
        tensors = {**batch, "labels": labels}
        for number, end, token in ends:
            tensors = self.with_end(tensors, number, end, token)
        return tensors

    def has_no_end(self, chat: list[Any]) -> bool:
        """Whether the template writes nothing after the answer that a chat ends with."""
        answer = chat[-1]["content"][-1]["text"]
        text = self.processor.apply_chat_template([chat], tokenize=False)[0]
        return answer != "" and text.rstrip().endswith(answer)

    def next_turn(self, chat: list[Any], row: list[int], end: int) -> int:
        """The token by which the template begins a question, at place ``end``: GLM-4's answers have
        no other end, and its generation stops there. Raises ValueError if it is a word of the text:
        no end could be learned."""
        question = {"role": "user", "content": [{"type": "text", "text": "x"}]}
        tokens = self.tokens([*chat, question], row)
        special = self.processor.tokenizer.added_tokens_decoder
        if end < len(tokens) and tokens[end] in special:
            return tokens[end]
        tail = self.processor.decode(tokens[max(0, end - 8) : end + 8])
        raise ValueError(
            f"the chat template writes no token that ends an answer ({tail!r}), so that none can "
            "be learned; build the model with another (--chat-template FILE)"
        )

    def with_end(
        self, tensors: dict[str, Any], number: int, position: int, token: int
    ) -> dict[str, Any]:
        """A batch in which ``token`` is learned at a place of a row: where the conversation goes on
        it is there, else it takes the place of padding, or of a new column."""
        shape = tensors["labels"].shape
        if position == shape[1]:
            pad_token = self.processor.tokenizer.pad_token_id
            padding_of = {"labels": -100, "input_ids": pad_token}
            for name, value in tensors.items():
                if value.shape == shape:
                    padding = padding_of.get(name, 0)
                    tensors[name] = nn.functional.pad(value, (0, 1), value=padding)
        tensors["input_ids"][number, position] = token
        tensors["attention_mask"][number, position] = 1
        tensors["labels"][number, position] = token
        return tensors


def answer_length(answer: list[int], row: list[int]) -> int:
    """How many tokens at the start of ``row`` are the answer's. An answer that is the last of its
    chat may have more: an empty thought before it (Qwen 3), a token behind it (Phi 3)."""
    longest = 0
    for skipped in range(len(answer)):
        length = 0
        for token, expected in zip(answer[skipped:], row, strict=False):
            if token != expected:
                break
            length += 1
        longest = max(longest, length)
    return longest
