"""Compare an exported model with LLaVA's own code on the same checkpoint: one question about one image.

Both compute in fp32, with weights rounded to the exported dtype, so that what differs is the conversion. The greedy
answer is transformers'; each of its tokens must be the one that LLaVA's code finds most likely after those before it,
and so LLaVA's greedy answer is the same.
Shapes: T positions of the prompt with its image's patches, V tokens of LLaVA's vocabulary, S image size in pixels.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from llava_integration.serve.build import register
from llava_integration.serve.export import DTYPES, TEMPLATE, Export
from llava_integration.serve.prompt import conversation_named
from llava_integration.towers import loading
from llm2clip_plugin.console import quiet_llava_loading, quiet_transformers
from llm2clip_plugin.files import ContractError

# LLaVA may be in an environment of its own, not where types are checked.
# pyright: reportMissingImports=false


QUESTION = "What is in this picture?"
NEW_TOKENS = 16
IMAGE_SIDES = (427, 640)  # of COCO's pictures: rows, columns
PIXEL_TOLERANCE = 1e-5  # of normalized pixels; one level of 255 is about 0.015
LOGIT_TOLERANCE = 1e-3  # of the largest logit


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one side computes."""

    token_ids: list[int]  # of the prompt, one ``<image>`` for the image
    pixels_3SS: Tensor
    logits_TV: Tensor
    answer: list[int]  # greedy; LLaVA's: its most likely token at each place of the other's answer


def test_image() -> Any:
    """A picture with edges and gradients that is not square, the same at every call."""
    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[0 : IMAGE_SIDES[0], 0 : IMAGE_SIDES[1]]
    waves = np.stack((rows / 2, 127 + 127 * np.sin(columns / 40), (rows // 40 + columns // 40) % 2 * 200), axis=-1)
    return Image.fromarray(waves.clip(0, 255).astype("uint8"))


def compare(made: Export, directory: Path) -> str:
    """Compare the exported ``directory`` with LLaVA's own code; one model after the other is in memory.

    Returns what was compared. Raises ContractError, naming the first thing that differs.
    """
    with torch.inference_mode():
        ours = hf_outcome(made, directory)
        theirs = llava_outcome(made, ours.answer)
    where = f"the exported model differs from LLaVA's own code on {made.checkpoint.directory}"
    vocabulary = theirs.logits_TV.shape[1]
    expected_ids = [vocabulary if token < 0 else token for token in theirs.token_ids]
    if ours.token_ids != expected_ids:
        raise ContractError(f"{where}: the prompt's token ids {_first_difference(ours.token_ids, expected_ids)}")
    pixels = _largest(ours.pixels_3SS, theirs.pixels_3SS, where, "pixels")
    logits = _largest(ours.logits_TV[:, :vocabulary], theirs.logits_TV, where, "logits")
    top = theirs.logits_TV.abs().max().item()
    if pixels > PIXEL_TOLERANCE:
        raise ContractError(f"{where}: pixels by {pixels:.2g} (at most {PIXEL_TOLERANCE:g})")
    if logits > top * LOGIT_TOLERANCE:
        raise ContractError(f"{where}: logits by {logits:.2g}, where the largest is {top:.3g}")
    if ours.answer != theirs.answer:
        raise ContractError(f"{where}: the greedy answer's tokens {_first_difference(ours.answer, theirs.answer)}")
    return (
        f"token ids equal, pixels within {pixels:.1e}, logits within {logits:.1e} (largest {top:.3g}), answers of "
        f"{len(ours.answer)} tokens equal"
    )


def _first_difference(ours: list[int], theirs: list[int]) -> str:
    pairs = zip(ours, theirs, strict=False)
    place = next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(ours), len(theirs)))
    return f"at {place} are {ours[place : place + 3]}, LLaVA's are {theirs[place : place + 3]}"


def _largest(ours: Tensor, theirs: Tensor, where: str, what: str) -> float:
    if ours.shape != theirs.shape:
        raise ContractError(f"{where}: {what} have shape {tuple(ours.shape)}, LLaVA's {tuple(theirs.shape)}")
    return (ours - theirs).abs().max().item()


def rounded(model: Any, dtype: torch.dtype | None) -> Any:
    """The model in fp32, its weights rounded to ``dtype``, and to fp16 outside the tower, as LLaVA loads them."""
    for name, parameter in model.named_parameters():
        value = parameter.data.to(dtype or parameter.dtype)
        parameter.data = value.float() if "vision_tower" in name else value.half().float()
    for module in model.modules():  # transformers 4.37 makes rotary tables in the dtype that a model is loaded in
        if hasattr(module, "_set_cos_sin_cache"):
            module._set_cos_sin_cache(module.max_seq_len_cached, module.inv_freq.device, torch.float32)
    return model.float()


def llava_outcome(made: Export, answer: list[int]) -> Outcome:
    """LLaVA's own loader, conversation, image processing and model, on the prompt and an answer to it."""
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.conversation import SeparatorStyle, conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    checkpoint = made.checkpoint
    quiet_llava_loading()
    with quiet_transformers(), loading(str(checkpoint.directory)):
        tokenizer, model, image_processor, _ = load_pretrained_model(
            str(checkpoint.directory),
            str(checkpoint.base) if checkpoint.base else None,
            "llava-lora" if checkpoint.kind == "lora" else "llava",  # decides how LLaVA loads it
            device="cpu",
        )
    model = rounded(model.to("cpu"), DTYPES[made.dtype])
    conversation = conv_templates[made.conversation].copy()
    conversation.append_message(conversation.roles[0], f"{conversation_named(made.conversation).image}{QUESTION}")
    conversation.append_message(conversation.roles[1], None)
    text = conversation.get_prompt()
    if conversation.sep_style is SeparatorStyle.PLAIN:
        text = text.removesuffix(conversation.sep)  # in training it follows the answer alone
    ids = cast(list[int], tokenizer_image_token(text, tokenizer, IMAGE_TOKEN_INDEX))
    pixels = process_images([test_image()], image_processor, model.config)
    logits_TV = model(torch.tensor([ids + answer]), images=pixels).logits[0]
    end = len(logits_TV) - len(answer)
    likely = logits_TV[end - 1 : -1].argmax(-1).tolist()
    return Outcome(token_ids=ids, pixels_3SS=pixels[0], logits_TV=logits_TV[:end], answer=likely)


def hf_outcome(made: Export, directory: Path) -> Outcome:
    """The exported model in transformers, with its own processor."""
    import transformers

    register()
    with quiet_transformers():
        model: Any = transformers.LlavaForConditionalGeneration.from_pretrained(directory, torch_dtype=torch.float32)
    model = rounded(model.eval(), DTYPES[made.dtype])
    if transformers.__version__.startswith("4.37."):
        inputs = inputs_of_4_37(made, directory)
    else:
        processor: Any = transformers.AutoProcessor.from_pretrained(directory, backend="pil")
        inputs = processor(images=test_image(), text=prompt(processor.tokenizer, directory), return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    logits = model(**inputs).logits[0]
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0, len(ids) :].tolist()
    image_id = model.config.image_token_index
    one = [token for token, before in zip(ids, [None, *ids], strict=False) if token != image_id or before != image_id]
    return Outcome(token_ids=one, pixels_3SS=inputs["pixel_values"][0], logits_TV=logits, answer=answer)


def inputs_of_4_37(made: Export, directory: Path) -> dict[str, Any]:
    """The model's inputs in the transformers that LLaVA pins, whose processor neither pads images nor counts their
    tokens: one token for an image, which is padded by LLaVA's code."""
    import transformers
    from llava.mm_utils import process_images

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    image_processor = transformers.CLIPImageProcessor.from_pretrained(directory)
    aspect = SimpleNamespace(image_aspect_ratio="pad" if made.pads else None)
    pixels = process_images([test_image()], image_processor, aspect)
    return {**tokenizer(prompt(tokenizer, directory), return_tensors="pt"), "pixel_values": pixels}


def prompt(tokenizer: Any, directory: Path) -> str:
    """The question about an image, by the exported chat template; without ``<s>``, which the tokenizer adds."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=(directory / TEMPLATE).read_text(encoding="utf-8"),
        tokenize=False,
        add_generation_prompt=True,
    )
    return text.removeprefix(tokenizer.bos_token or "")
