"""A LLaVA model that answers batches of questions.

LLaVA is imported when a model is loaded: ``--help`` works without it.
"""

import os
from collections.abc import Iterator
from typing import Any

from llava_integration.answer.options import AnswerConfig
from llava_integration.answer.questions import Prepare, Prepared, Question, conversation_of, padded
from llm2clip_plugin.console import quiet_llava_loading

# LLaVA may be in an environment of its own, not where types are checked.
# pyright: reportMissingImports=false


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
