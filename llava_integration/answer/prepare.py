"""From a question to token ids and pixels, as LLaVA's own evaluation prepares them.

Shape letters: B questions, T tokens, S image size in pixels.
"""

# LLaVA may be in an environment of its own, not where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_integration.answer.questions import Question
from llm2clip_plugin.options.names import unknown

if TYPE_CHECKING:
    import torch

# index in the question file, token ids (T,), pixels or None without image, (width, height) of the image
Prepared = tuple[int, "torch.Tensor", "torch.Tensor | None", "tuple[int, int]"]


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Questions as a dataset for torch's DataLoader; contains no weights, so that its worker processes stay small."""

    questions: list[tuple[int, Question]]  # index in the question file, question
    folder: str  # of images
    conversation: Any  # LLaVA's conversation template
    tokenizer: Any
    image_processor: Any
    model_config: Any

    def __len__(self) -> int:
        """Number of questions."""
        return len(self.questions)

    def __getitem__(self, item: int) -> Prepared:
        """One question; pixels are (3, S, S), or (tiles, 3, S, S) for anyres."""
        from llava.constants import IMAGE_TOKEN_INDEX
        from llava.mm_utils import process_images, tokenizer_image_token

        index, question = self.questions[item]
        pixels, size = None, (0, 0)
        if question.image:
            image = question.open_image(self.folder)
            pixels, size = process_images([image], self.image_processor, self.model_config)[0], image.size
        words = self.prompt(question)
        tokens: Any = tokenizer_image_token(words, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        return index, tokens, pixels, size

    def prompt(self, question: Question) -> str:
        """The text that the model reads: template, image token, question."""
        from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN

        text = question.text
        if question.image:
            token = DEFAULT_IMAGE_TOKEN
            if getattr(self.model_config, "mm_use_im_start_end", False):
                token = DEFAULT_IM_START_TOKEN + token + DEFAULT_IM_END_TOKEN
            text = f"{token}\n{text}"
        conversation = self.conversation.copy()
        conversation.append_message(conversation.roles[0], text)
        conversation.append_message(conversation.roles[1], None)
        return conversation.get_prompt()


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows -> ids and attention mask, both (B, T), padded on the left with 0."""
    import torch

    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = tokens
        mask[row, width - len(tokens) :] = 1
    return ids, mask


def conversation_of(model_name: str, mode: str) -> Any:
    """LLaVA's template of that name; its ``_mmtag`` form for models pretrained on plain captions, as in LLaVA.

    Raises ValueError with the known names for an unknown one.
    """
    from llava.conversation import conv_templates

    if "plain" in model_name and "finetune" not in model_name.lower() and "mmtag" not in mode:
        mode = f"{mode}_mmtag"
    if mode not in conv_templates:
        raise ValueError(unknown("--conv-mode", mode, sorted(conv_templates)))
    return conv_templates[mode]
