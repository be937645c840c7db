"""Write a LLaVA 1.5 checkpoint as a Hugging Face model: LlavaForConditionalGeneration with its LlavaProcessor.

| file                                     | contents                                                           |
|------------------------------------------|--------------------------------------------------------------------|
| config.json, generation_config.json      | the model; provenance under ``llm2clip_export``, ``llm2clip_tower`` |
| model*.safetensors                       | the weights under the names that servers know                      |
| tokenizer.json, tokenizer_config.json    | LLaVA's tokenizer with ``<image>``                                 |
| preprocessor_config, processor_config    | the image processor, and how many tokens an image has              |
| chat_template.jinja                      | the conversation that the model was trained with                   |
| llm2clip_tower.json, README.md           | the tower's card, and a model card                                 |

The files are written by hand: transformers 5 drops ``vision_model.`` from a tower's names when it saves, which servers
then do not find.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

import llm2clip_plugin
from llava_integration.hook import CONVERSATION
from llava_integration.serve.build import ExportedTower, find_tower, language_tensors, register, text_config
from llava_integration.serve.checkpoint import LlavaCheckpoint, checkpoint_tensors, open_checkpoint, write_shards
from llava_integration.serve.prompt import CONVERSATIONS, IMAGE, choose, read_tokenizer, write_tokenizer
from llava_integration.towers import loading
from llm2clip_plugin.console import quiet_llava_loading, quiet_transformers
from llm2clip_plugin.contracts import atomic_directory
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.vision.directory import write_json
from llm2clip_plugin.vision.export import LICENSE, markdown_table

KEY = "llm2clip_export"  # in config.json: from what it was made
TEMPLATE = "chat_template.jinja"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "keep": None}


@dataclass(frozen=True, kw_only=True)
class Export:
    """A Hugging Face LLaVA to write; everything that can be wrong with it is found before anything is written."""

    checkpoint: LlavaCheckpoint
    tower: ExportedTower
    conversation: str  # a name of LLaVA's
    dtype: str  # fp16 | bf16 | fp32 | keep: each tensor's own

    @classmethod
    def of(
        cls, directory: Path, *, base: Path | None = None, tower: str = "", conv_mode: str = "", dtype: str = "fp16"
    ) -> "Export":
        """``base``: of a LoRA or projector checkpoint. Raises ValueError or FileNotFoundError for what is wrong."""
        checkpoint = open_checkpoint(directory, base)
        recorded = str(checkpoint.config.get(CONVERSATION, "plain" if checkpoint.kind == "projector" else ""))
        conversation = choose(conv_mode, recorded, where=directory)
        return cls(checkpoint=checkpoint, tower=find_tower(checkpoint, tower), conversation=conversation, dtype=dtype)

    @property
    def pads(self) -> bool:
        """Images are padded to squares instead of cropped."""
        return self.checkpoint.config.get("image_aspect_ratio") == "pad"

    def describe(self) -> str:
        """One line: what is exported, and how."""
        base = f" on {self.checkpoint.base}" if self.checkpoint.base else ""
        tower = f"{self.tower.family.name} tower at {self.tower.config['image_size']} px"
        images = "padded to squares" if self.pads else "cropped"
        return f"{self.checkpoint.kind} checkpoint{base}, {tower}, images {images}, conversation {self.conversation}"


def export(made: Export, output: Path, *, overwrite: bool = False, compares: bool = False) -> int:
    """Write ``made`` to ``output``, completely or not at all; the bytes of its weights.

    ``compares``: with LLaVA's own code, before the folder gets its name. Raises FileExistsError if it is not empty.
    """
    with atomic_directory(output, replace=overwrite) as temporary:
        size = write_model(made, temporary)
        if compares:
            print(f"compared with LLaVA's own code: {compare(made, temporary)}", flush=True)
    return size


def write_model(made: Export, directory: Path) -> int:
    """Write every file into an empty folder; the bytes of the weights."""
    checkpoint, config, tower = made.checkpoint, made.checkpoint.config, made.tower
    tokenizer = read_tokenizer(checkpoint.language_model)
    image_id = write_tokenizer(tokenizer, directory, max_length=config.get("tokenizer_model_max_length"))
    with ExitStack() as opened:
        own = checkpoint_tensors(checkpoint, opened)
        tensors = language_tensors(own, config, image_id, checkpoint.language_model)
        tensors |= tower.tensors(own, unfrozen=bool(config.get("unfreeze_mm_vision_tower")), files=opened)
        size = write_shards(tensors, directory, DTYPES[made.dtype])
    chosen = tower.selection(feature := config.get("mm_vision_select_feature", "patch"))
    stored = DTYPES[made.dtype] or config.get("torch_dtype") or config.get("dtype") or "float16"
    stored = str(stored).removeprefix("torch.")
    text = text_config(config, image_id + 1)
    places = {"checkpoint": checkpoint.directory, "base_model": checkpoint.base}  # no path of this machine is recorded
    made_from = {
        **{name: place.resolve().name if place else "" for name, place in places.items()},
        "kind": checkpoint.kind,
        "version": llm2clip_plugin.__version__,
        "conversation": made.conversation,
        "image_aspect_ratio": config.get("image_aspect_ratio") or "square",
        "dtype": made.dtype,
        "tower_sha256": tower.location.sha256 if tower.location else "",
    }
    body = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_id,
        "text_config": {**text, "torch_dtype": stored},
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        **{name: text[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id") if name in text},
        "torch_dtype": stored,
        KEY: made_from,
        **tower.settings(directory, layer=config["mm_vision_select_layer"], feature=feature, dtype=stored),
    }
    write_json(directory / "config.json", body)
    ids = {f"{name}_id": tokenizer.id_of(name) for name in ("bos_token", "eos_token", "pad_token")}
    ids["pad_token_id"] = tokenizer.id_of("unk_token") if ids["pad_token_id"] is None else ids["pad_token_id"]
    ids = {name: number for name, number in ids.items() if number is not None}
    write_json(directory / "generation_config.json", {**ids, "do_sample": False})
    write_json(directory / "preprocessor_config.json", tower.image_processor(pads=made.pads))
    processor = {"processor_class": "LlavaProcessor", "image_token": IMAGE, "patch_size": tower.config["patch_size"]}
    processor |= {name: value for name, value in chosen.items() if name != "image_seq_length"}
    write_json(directory / "processor_config.json", processor)
    template = CONVERSATIONS[made.conversation].served_template(bos=tokenizer.adds_bos, space=not tokenizer.legacy)
    (directory / TEMPLATE).write_text(template, encoding="utf-8")
    what = f"LLaVA 1.5{' with an LLM2CLIP vision tower' if tower.card else ''}, exported by llm2clip-plugin."
    table = {name.replace("_", " "): f"`{value}`" for name, value in made_from.items() if value}
    if card := tower.card:  # whose terms the model inherits
        table |= {"tower started from": f"`{card.origin}`", "tower's teacher": card.teacher.get("llm")}
    readme = page(made_from["checkpoint"], what, table, tower, own_code="auto_map" in body)
    (directory / "README.md").write_text(readme, encoding="utf-8")
    return size


# The README.md of an exported model

USE = """\
## Use

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("PATH_OR_HUB_ID"OPTION)
model = AutoModelForImageTextToText.from_pretrained("PATH_OR_HUB_ID"OPTION)
content = [{"type": "image", "url": "photo.jpg"}, {"type": "text", "text": "What is in this picture?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```
"""
SERVED = "\nServed with an OpenAI-compatible API: `vllm serve PATH_OR_HUB_ID`"
STOCK = ("clip_vision_model", "siglip_vision_model")  # towers that vLLM has
PLUGIN = " (`pip install llm2clip-plugin` gives vLLM the vision tower)"
OPTION = ", trust_remote_code=True"  # runs the tower's code, which is saved with the model


def page(
    title: str, what: str, rows: dict[str, Any], tower: ExportedTower, *, own_code: bool, served: bool = True
) -> str:
    """The README.md: ``what`` the model is, a table of ``rows``, how to use it, and to serve it by vLLM.

    ``own_code``: the tower's code is saved with the model.
    """
    table = markdown_table(("", ""), [(name, value) for name, value in rows.items() if value])
    head = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text", "license: other"]
    head += ["tags:", "- llava", "- llm2clip", "---", "", f"# {title}", ""]
    use = USE.replace("OPTION", OPTION if own_code else "")
    if served:
        use += f"{SERVED}{'' if tower.config['model_type'] in STOCK else PLUGIN}\n"
    return "\n".join([*head, what, "", table, LICENSE, use])


# Compare an exported model with LLaVA's own code on the same checkpoint: one question about one image.

# LLaVA may be in an environment of its own, not where types are checked.
# pyright: reportMissingImports=false


QUESTION = "What is in this picture?"
NEW_TOKENS = 16
IMAGE_SIDES = (427, 640)  # of COCO's pictures: rows, columns
PIXEL_TOLERANCE = 1e-5  # of normalized pixels; one level of 255 is about 0.015
LOGIT_TOLERANCE = 1e-3  # of the largest logit


class Outcome(NamedTuple):
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
    """Compare the exported ``directory`` with LLaVA's own code; what was compared. ContractError for a difference."""
    with torch.inference_mode():
        ours = hf_outcome(made, directory)
        theirs = llava_outcome(made, ours.answer)
    where = f"the exported model differs from LLaVA's own code on {made.checkpoint.directory.name}"
    top, vocabulary = theirs.logits_TV.abs().max().item(), theirs.logits_TV.shape[1]
    expected = [vocabulary if token < 0 else token for token in theirs.token_ids]
    for what, mine, other in (("prompt", ours.token_ids, expected), ("answer", ours.answer, theirs.answer)):
        if mine != other:
            raise ContractError(f"{where}: the {what}'s token ids are {mine}, LLaVA's {other}")
    largest = {}
    for what, mine, other, limit in (
        ("pixels", ours.pixels_3SS, theirs.pixels_3SS, PIXEL_TOLERANCE),
        ("logits", ours.logits_TV[:, :vocabulary], theirs.logits_TV, top * LOGIT_TOLERANCE),
    ):
        largest[what] = (mine - other).abs().max().item() if mine.shape == other.shape else float("inf")
        if not largest[what] <= limit:
            raise ContractError(f"{where}: {what} by {largest[what]:.2g} (at most {limit:.2g})")
    return (
        f"token ids equal, pixels within {largest['pixels']:.1e}, logits within {largest['logits']:.1e} "
        f"(largest {top:.3g}), answers of {len(ours.answer)} tokens equal"
    )


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
    conversation.append_message(conversation.roles[0], f"{CONVERSATIONS[made.conversation].image}{QUESTION}")
    conversation.append_message(conversation.roles[1], None)
    text = conversation.get_prompt()
    if conversation.sep_style is SeparatorStyle.PLAIN:
        text = text.removesuffix(conversation.sep)  # in training it follows the answer alone
    ids = cast(list[int], tokenizer_image_token(text, tokenizer, IMAGE_TOKEN_INDEX))
    pixels = process_images([test_image()], image_processor, model.config)
    logits_TV = model(torch.tensor([ids + answer]), images=pixels).logits[0]
    end = len(logits_TV) - len(answer)
    likely = logits_TV[end - 1 : -1].argmax(-1).tolist()
    return Outcome(ids, pixels[0], logits_TV[:end], likely)


def hf_outcome(made: Export, directory: Path) -> Outcome:
    """The exported model in transformers, with its own processor."""
    import transformers

    register()
    with quiet_transformers():
        model: Any = transformers.LlavaForConditionalGeneration.from_pretrained(directory, torch_dtype=torch.float32)
    model = rounded(model.eval(), DTYPES[made.dtype])
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
        chat_template=(directory / TEMPLATE).read_text(encoding="utf-8"),
        tokenize=False,
        add_generation_prompt=True,
    )
    if transformers.__version__.startswith("4.37."):  # its processor neither pads images nor counts their tokens
        from llava.mm_utils import process_images

        image_processor = transformers.CLIPImageProcessor.from_pretrained(directory)
        aspect = SimpleNamespace(image_aspect_ratio="pad" if made.pads else None)
        inputs = {
            **tokenizer(text, return_tensors="pt"),
            "pixel_values": process_images([test_image()], image_processor, aspect),
        }
    else:
        processor: Any = transformers.AutoProcessor.from_pretrained(directory, backend="pil")
        inputs = processor(images=test_image(), text=text, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    logits = model(**inputs).logits[0]
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0, len(ids) :].tolist()
    image_id = model.config.image_token_index
    one = [token for token, before in zip(ids, [None, *ids], strict=False) if token != image_id or before != image_id]
    return Outcome(one, inputs["pixel_values"][0], logits, answer)
