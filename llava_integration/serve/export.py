"""A LLaVA 1.5 checkpoint as a Hugging Face model: LlavaForConditionalGeneration with its
LlavaProcessor."""

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llava_integration.plug.checkpoints import blocks_below, check_feature, is_unfrozen
from llava_integration.plug.hook import CONVERSATION
from llava_integration.plug.pickles import load_tensors_only
from llava_integration.plug.towers import is_ours, loading, locate_tower
from llava_integration.serve import EXPORT
from llava_integration.serve.build import (
    TEMPLATE,
    ExportedTower,
    language_tensors,
    register,
    text_config,
    write_folder,
)
from llava_integration.serve.checkpoint import (
    LlavaCheckpoint,
    checkpoint_tensors,
    open_checkpoint,
)
from llava_integration.serve.prompt import (
    CONVERSATIONS,
    IMAGE,
    MODEL,
    chat_template,
    read_tokenizer,
)
from llm2clip_plugin.atomic import size_text
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.folders import MODEL_FOLDER, output_folder
from llm2clip_plugin.options import unknown
from llm2clip_plugin.precision import DTYPES
from llm2clip_plugin.pretrained import open_pretrained, run_no_code
from llm2clip_plugin.quiet import quiet_llava_loading, quiet_transformers
from llm2clip_plugin.vision.directory import fetch_directory


@dataclass(frozen=True, kw_only=True)
class Export:
    """A Hugging Face LLaVA to write."""

    checkpoint: LlavaCheckpoint
    tower: ExportedTower
    conversation: str  # a name of LLaVA's
    dtype: str  # fp16 | bf16 | fp32

    @classmethod
    def of(
        cls,
        directory: Path,
        *,
        base: Path | None = None,
        tower: str = "",
        conv_mode: str = "",
        dtype: str = "fp16",
    ) -> "Export":
        """``base``: of a LoRA. Raises ValueError or FileNotFoundError for what is wrong."""
        checkpoint = open_checkpoint(directory, base)
        recorded = str(checkpoint.config.get(CONVERSATION, ""))
        # vicuna_v1: of LLaVA 1.5, in LLaVA's evaluation scripts
        name = conv_mode or recorded or "vicuna_v1"
        if name not in CONVERSATIONS:
            raise ValueError(unknown("conversation", name, CONVERSATIONS))
        if recorded in CONVERSATIONS and CONVERSATIONS[name] != CONVERSATIONS[recorded]:
            raise ValueError(
                f"{directory} was trained with the conversation {recorded!r}; "
                f"leave out --conv-mode {conv_mode}"
            )
        return cls(
            checkpoint=checkpoint,
            tower=find_tower(checkpoint, tower),
            conversation=name,
            dtype=dtype,
        )

    @property
    def pads(self) -> bool:
        """Images are padded to squares instead of cropped."""
        return self.checkpoint.config.get("image_aspect_ratio") == "pad"


def find_tower(checkpoint: LlavaCheckpoint, tower: str = "") -> ExportedTower:
    """The tower that loading the checkpoint finds, or ``tower`` (path, registered name or Hub id).

    Raises FileNotFoundError or ContractError without that tower, if its files are damaged, or if it
    has no such state as LLaVA's config selects or another width than the projector.
    """
    config = checkpoint.config
    where = checkpoint.directory
    name = str(config["mm_vision_tower"])
    location = None
    if is_ours(name) or tower:
        with loading(str(where)):
            location = locate_tower(where, name, config, tower)
        location.check_weights()
    directory = location.directory if location else fetch_directory(name)
    exported = ExportedTower.of(directory, location)
    blocks_below(config["mm_vision_select_layer"], exported.config["num_hidden_layers"])
    check_feature(config.get("mm_vision_select_feature", "patch"))
    expected = config.get("mm_hidden_size")
    width = exported.config["hidden_size"]
    if expected != width:
        raise ContractError(
            f"the projector of {where} expects features of width {expected}, but the tower in "
            f"{directory} has hidden_size {width}; "
            "pass the tower that it was trained with as --tower"
        )
    return exported


def main(argv: list[str]) -> int:
    """Convert a LLaVA 1.5 checkpoint into a Hugging Face model."""
    options = EXPORT.parse(argv)
    exported = Export.of(
        options.checkpoint,
        base=options.model_base,
        tower=options.tower,
        conv_mode=options.conv_mode,
        dtype=options.dtype,
    )
    compares = options.compare and find_spec("llava") is not None
    size = export(
        exported, options.output, overwrite=options.overwrite, compares=compares
    )
    weights = f"{size_text(size)} of {options.dtype} weights, every tensor verified by reloading"
    compared = ""
    if not compares:
        compared = "; not compared with LLaVA's own code"
        if options.compare:
            compared += ": LLaVA is not installed in this environment"
    print(f"{options.output}: {weights}{compared}")
    return 0


def export(
    exported: Export, output: Path, *, overwrite: bool = False, compares: bool = False
) -> int:
    """Write ``made`` to ``output``, completely or not at all; the bytes of its weights.

    ``compares``: with LLaVA's own code, before the folder gets its name. Raises FileExistsError if
    it is not empty.
    """
    with output_folder(output, MODEL_FOLDER, replace=overwrite) as temporary:
        size = write_model(exported, temporary)
        if compares:
            result = compare(exported, temporary)
            print(f"compared with LLaVA's own code: {result}", flush=True)
    return size


def write_model(exported: Export, directory: Path) -> int:
    """Write every file into an empty folder; the bytes of the weights."""
    checkpoint = exported.checkpoint
    config = exported.checkpoint.config
    tower = exported.tower
    tokenizer = read_tokenizer(checkpoint.language_model)
    tokenizer.write(directory, max_length=config.get("tokenizer_model_max_length"))
    shutil.copyfile(checkpoint.language_model / MODEL, directory / MODEL)
    image_id = tokenizer.fast.token_to_id(IMAGE)
    recorded = {
        "checkpoint": checkpoint.directory.resolve().name,
        "base_model": checkpoint.base.resolve().name if checkpoint.base else "",
        "kind": "lora" if checkpoint.base else "full",
        "conversation": exported.conversation,
        "image_aspect_ratio": config.get("image_aspect_ratio") or "square",
        "dtype": exported.dtype,
        "tower_sha256": tower.location.sha256 if tower.location else "",
    }
    ids = {
        name: number
        for name, number in tokenizer.ids().items()
        if name != "unk_token_id"
    }
    model = "LLaVA 1.5"
    if tower.location:
        model += " with an LLM2CLIP vision tower"
    with ExitStack() as files:
        stored = checkpoint_tensors(checkpoint, files)
        tensors = language_tensors(stored, config, image_id, checkpoint.language_model)
        trained = stored if is_unfrozen(config) else None
        return write_folder(
            directory,
            tower,
            tensors | tower.tensors(files, trained),
            title=recorded["checkpoint"],
            what=f"{model}, exported by llm2clip-plugin.",
            made_from=("llm2clip_export", recorded),
            layer=config["mm_vision_select_layer"],
            feature=config.get("mm_vision_select_feature", "patch"),
            pads=exported.pads,
            dtype=DTYPES[exported.dtype],
            text=text_config(config, image_id + 1),
            slots={"image_token_index": image_id},
            ids=ids,
            generation={"do_sample": False},
            template=chat_template(
                exported.conversation,
                bos=tokenizer.adds_bos,
                space=not tokenizer.legacy,
            ),
        )


# Compare an exported model with LLaVA's own code on the same checkpoint: one question about one
# image.

# LLaVA may be in an environment of its own, not where types are checked.
# pyright: reportMissingImports=false

QUESTION = "What is in this picture?"
NEW_TOKENS = 16
IMAGE_SIDES = (427, 640)  # of COCO's pictures: rows, columns
PIXEL_TOLERANCE = 1e-5  # of normalized pixels; one level of 255 is about 0.015
# of the largest logit: both sides compute in float32 with the same rounded weights, tiny models
# to 6e-7
LOGIT_TOLERANCE = 2e-4

# What one side computes: token ids of the prompt, one ``<image>`` for the image; pixels (3, S, S);
# logits (T, V); the greedy answer, of LLaVA its most likely token at each place of the other's
# answer
Outcome = tuple[list[int], Tensor, Tensor, list[int]]


def test_image() -> Any:
    """A picture with edges and gradients that is not square, the same at every call."""
    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[0 : IMAGE_SIDES[0], 0 : IMAGE_SIDES[1]]
    gradient = rows / 2
    waves = 127 + 127 * np.sin(columns / 40)
    squares = (rows // 40 + columns // 40) % 2 * 200
    pixels = np.stack((gradient, waves, squares), axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype("uint8"))


def question_with_image() -> list[dict[str, Any]]:
    """A conversation that asks QUESTION about one image."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}]


def compare(exported: Export, directory: Path) -> str:
    """Compare the exported ``directory`` with LLaVA's own code; what was compared. ContractError
    for a difference."""
    with torch.inference_mode():
        ids, pixels, logits, answer = hf_outcome(exported, directory)
        their_ids, their_pixels, their_logits, likely = llava_outcome(exported, answer)
    where = (
        "the exported model differs from LLaVA's own code on "
        f"{exported.checkpoint.directory.name}"
    )
    top = their_logits.abs().max().item()
    vocabulary = their_logits.shape[1]
    expected = [vocabulary if token < 0 else token for token in their_ids]
    for what, mine, other in (("prompt", ids, expected), ("answer", answer, likely)):
        if mine != other:
            raise ContractError(
                f"{where}: the {what}'s token ids are {mine}, LLaVA's {other}"
            )
    largest = {}
    for what, mine, other, limit in (
        ("pixels", pixels, their_pixels, PIXEL_TOLERANCE),
        ("logits", logits[:, :vocabulary], their_logits, top * LOGIT_TOLERANCE),
    ):
        largest[what] = float("inf")
        if mine.shape == other.shape:
            largest[what] = (mine - other).abs().max().item()
        if not largest[what] <= limit:
            raise ContractError(
                f"{where}: {what} by {largest[what]:.2g} (at most {limit:.2g})"
            )
    return (
        f"token ids equal, pixels within {largest['pixels']:.1e}, "
        f"logits within {largest['logits']:.1e} (largest {top:.3g}), "
        f"answers of {len(answer)} tokens equal"
    )


def rounded(model: Any, dtype: torch.dtype) -> Any:
    """The model in fp32, its weights rounded to ``dtype``, and to fp16 outside the tower, as LLaVA
    loads them."""
    # buffers, too: RADIO has the pixels' mean and deviation in its file
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            value = tensor.data.to(dtype)
            if "vision_tower" not in name:
                value = value.half()
            tensor.data = value.float()
    # transformers 4.37 makes rotary tables in the dtype that a model is loaded in
    for module in model.modules():
        if hasattr(module, "_set_cos_sin_cache"):
            module._set_cos_sin_cache(
                module.max_seq_len_cached, module.inv_freq.device, torch.float32
            )
    return model.float()


def llava_outcome(exported: Export, answer: list[int]) -> Outcome:
    """LLaVA's own loader, conversation, image processing and model, on the prompt and an answer to
    it."""
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    run_no_code()
    load_tensors_only()
    where = str(exported.checkpoint.directory)
    base = str(exported.checkpoint.base or "") or None
    name = "llava-lora" if base else "llava"  # decides how LLaVA loads it
    quiet_llava_loading()
    with quiet_transformers(), loading(where):
        tokenizer, model, image_processor, _ = load_pretrained_model(
            where, base, name, device="cpu"
        )
    model = rounded(model.to("cpu"), DTYPES[exported.dtype])
    conversation = conv_templates[exported.conversation].copy()
    conversation.append_message(conversation.roles[0], f"{IMAGE}\n{QUESTION}")
    conversation.append_message(conversation.roles[1], None)
    prompt = conversation.get_prompt()
    ids: Any = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX)
    pixels = process_images([test_image()], image_processor, model.config)
    logits_TV = model(torch.tensor([ids + answer]), images=pixels).logits[0]
    end = len(logits_TV) - len(answer)
    likely = logits_TV[end - 1 : -1].argmax(-1).tolist()
    return ids, pixels[0], logits_TV[:end], likely


def hf_outcome(exported: Export, directory: Path) -> Outcome:
    """The exported model in transformers, with its own processor."""
    import transformers

    register()
    with quiet_transformers():
        model: Any = transformers.LlavaForConditionalGeneration.from_pretrained(
            directory, torch_dtype=torch.float32
        )
    model = rounded(model.eval(), DTYPES[exported.dtype])
    tokenizer = open_pretrained(transformers.AutoTokenizer, directory)
    template = (directory / TEMPLATE).read_text(encoding="utf-8")
    text = tokenizer.apply_chat_template(
        question_with_image(),
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
    )
    # its processor neither pads images nor counts their tokens
    if transformers.__version__.startswith("4.37."):
        from llava.mm_utils import process_images

        image_processor = transformers.CLIPImageProcessor.from_pretrained(directory)
        aspect = SimpleNamespace(image_aspect_ratio="pad" if exported.pads else None)
        pixels = process_images([test_image()], image_processor, aspect)
        inputs = {**tokenizer(text, return_tensors="pt"), "pixel_values": pixels}
    else:
        processor = open_pretrained(
            transformers.AutoProcessor, directory, backend="pil"
        )
        inputs = processor(images=test_image(), text=text, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    logits = model(**inputs).logits[0]
    output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    answer = output[0, len(ids) :].tolist()
    image_id = model.config.image_token_index
    with_one_image: list[int] = []  # token, in place of one for each patch
    for token in ids:
        if token != image_id or with_one_image[-1:] != [image_id]:
            with_one_image.append(token)
    return with_one_image, inputs["pixel_values"][0], logits, answer
