"""LLaVA's JSON as batches of transformers' Trainer, with the processor of an exported or built model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class LlavaRows:
    """A data collator: only answers are learned, as in LLaVA."""

    processor: Any  # transformers'
    images: str | Path  # the folder of the rows' images

    def chat(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Messages of a row, the image before the first question."""
        messages = []
        for turn in row["conversations"]:
            text = {"type": "text", "text": turn["value"].replace("<image>", "").strip()}
            messages.append({"role": "user" if turn["from"] == "human" else "assistant", "content": [text]})
        if "image" in row:
            messages[0]["content"].insert(0, {"type": "image", "path": str(Path(self.images) / row["image"])})
        return messages

    def encode(self, chats: list[Any], *, side: str = "right", **options: Any) -> Any:
        """Token ids, padded on a side, and pixels; ``options`` of ``apply_chat_template``."""
        padded = {"padding": True, "padding_side": side}
        options |= {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": padded}
        return self.processor.apply_chat_template(chats, **options)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch; labels are -100 except for the answers and the tokens that end them."""
        chats = [self.chat(row) for row in rows]
        batch = self.encode(chats)
        labels = torch.full_like(batch["input_ids"], -100)
        for number, turns in enumerate(chats):
            for turn in range(1, len(turns), 2):
                start = self.encode([turns[:turn]], add_generation_prompt=True)["input_ids"].shape[1]
                end = self.encode([turns[: turn + 1]])["input_ids"].shape[1]
                labels[number, start:end] = batch["input_ids"][number, start:end]
        return {**batch, "labels": labels}
