"""A LLaVA model that answers batches of questions, which are prepared as by LLaVA's own evaluation.

LLaVA is imported when a model is loaded: ``--help`` works without it.
Shape letters: B questions, T tokens, S image size in pixels.
"""

# LLaVA may be in an environment of its own, not where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_integration.answer.options import AnswerConfig
from llava_integration.answer.questions import Question
from llm2clip_plugin.console import quiet_llava_loading
from llm2clip_plugin.options import unknown

if TYPE_CHECKING:
    import torch

# index in the question file, token ids (T,), pixels or None without image, (width, height) of the image
Prepared = tuple[int, "torch.Tensor", "torch.Tensor | None", "tuple[int, int]"]


class Answerer:
    """A LLaVA model with its tokenizer and image processor."""

    def __init__(self, options: AnswerConfig):
        """Load the model as LLaVA's own evaluation does."""
        import torch
        from llava.mm_utils import get_model_name_from_path
        from llava.model.builder import load_pretrained_model

        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: no GPU is available to torch; pass --device cpu")
        path = os.path.expanduser(options.model_path)
        self.options, self.name = options, get_model_name_from_path(path)
        self.conversation = conversation_of(self.name, options.conv_mode)
        quiet_llava_loading()
        self.tokenizer, self.model, self.image_processor, _ = load_pretrained_model(
            path, options.model_base, self.name, options.load_8bit, options.load_4bit
        )
        if not (options.load_8bit or options.load_4bit) and options.dtype != "float16":
            self.model.to(getattr(torch, options.dtype))
        # Generation appends to the prompt: a batch is padded on the left.
        self.model.config.tokenizer_padding_side = "left"

    def batches(self, questions: list[Question], indices: list[int]) -> Iterator[list[Prepared]]:
        """Batches of prepared questions, with images first; a batch never mixes questions with and without an image."""
        from torch.utils.data import DataLoader

        with_image = [index for index in indices if questions[index].image]
        text_only = [index for index in indices if not questions[index].image]
        for group in (with_image, text_only):
            prepare = Prepare(
                questions=[(index, questions[index]) for index in group],
                folder=self.options.image_folder,
                conversation=self.conversation,
                tokenizer=self.tokenizer,
                image_processor=self.image_processor,
                model_config=self.model.config,
            )
            yield from DataLoader(
                prepare,  # pyright: ignore[reportArgumentType] - a map-style dataset needs no base class
                batch_size=self.options.batch_size,
                num_workers=min(self.options.workers, len(group)),
                collate_fn=list,
            )

    def generate(self, batch: list[Prepared]) -> list[str]:
        """The answers to a batch, without special tokens."""
        import torch

        device = self.model.device
        ids, mask = padded([tokens for _, tokens, _, _ in batch])
        arguments: dict[str, Any] = {"attention_mask": mask.to(device)}
        if batch[0][2] is not None:
            images = [p.to(device=device, dtype=self.model.dtype) for _, _, p, _ in batch if p is not None]
            same_shape = all(image.shape == images[0].shape for image in images)
            arguments["images"] = torch.stack(images) if same_shape else images
            arguments["image_sizes"] = [size for *_, size in batch]
        options, pad_token_id = self.options, self.tokenizer.pad_token_id
        arguments["do_sample"] = options.temperature > 0
        if options.temperature > 0:
            arguments |= {"temperature": options.temperature, "top_p": options.top_p}
        with torch.inference_mode():
            output = self.model.generate(
                ids.to(device),
                num_beams=options.num_beams,
                max_new_tokens=options.max_new_tokens,
                use_cache=True,
                pad_token_id=self.tokenizer.eos_token_id if pad_token_id is None else pad_token_id,
                **arguments,
            )
        return [text.strip() for text in self.tokenizer.batch_decode(output, skip_special_tokens=True)]


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
