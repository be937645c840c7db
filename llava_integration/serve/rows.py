"""LLaVA's JSON as batches of transformers' Trainer, with the processor of an exported or built
model."""

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch


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
        for turn in turns[turns[0]["from"] != "human" :]:
            text = {"type": "text", "text": turn["value"].replace("<image>", "").strip()}
            messages.append(
                {"role": "user" if turn["from"] == "human" else "assistant", "content": [text]}
            )
        if "image" in row:
            messages[0]["content"].insert(
                0, {"type": "image", "path": str(Path(self.images) / row["image"])}
            )
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
        return [token for one in ids for token in [one] * (row.count(image) if one == image else 1)]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch; labels are -100 except for the answers and the tokens that end them. Raises
        ValueError for a chat template that writes otherwise what is before an answer once that is
        there."""
        chats = [self.chat(row) for row in rows]
        batch = self.encode(chats)
        labels = torch.full_like(batch["input_ids"], -100)
        for number, (turns, row) in enumerate(zip(chats, batch["input_ids"].tolist(), strict=True)):
            for turn in (
                turn for turn, message in enumerate(turns) if message["role"] == "assistant"
            ):
                asked = self.tokens(turns[:turn], row, add_generation_prompt=True)
                start = len(asked)
                if row[:start] != asked:
                    tail = self.processor.decode(asked[-8:])
                    told = f"the chat template writes {tail!r} before an answer alone"
                    raise ValueError(f"{told}; build the model with another (--chat-template FILE)")
                said = self.tokens(turns[: turn + 1], row)[start:]
                # a last answer may have more: an empty thought before it (Qwen 3), a token behind
                # it (Phi 3)
                pairs = [
                    zip(said[skipped:], row[start:], strict=False)
                    for skipped in range(len(said) or 1)
                ]
                length = max(
                    len([*takewhile(lambda pair: pair[0] == pair[1], each)]) for each in pairs
                )
                labels[number, start : start + length] = batch["input_ids"][
                    number, start : start + length
                ]
        return {**batch, "labels": labels}
