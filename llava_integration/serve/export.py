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
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

import llm2clip_plugin
from llava_integration.hook import CONVERSATION
from llava_integration.serve import build as language
from llava_integration.serve import build as vision
from llava_integration.serve import prompt as conversation
from llava_integration.serve.build import register, write_code
from llava_integration.serve.checkpoint import LlavaCheckpoint, checkpoint_tensors, open_checkpoint, write_shards
from llava_integration.serve.prompt import conversation_named, read_tokenizer, write_tokenizer
from llava_integration.towers import KEY as TOWER_KEY
from llava_integration.towers import loading, tower_record
from llm2clip_plugin.console import quiet_llava_loading, quiet_transformers
from llm2clip_plugin.contracts import TowerCard, atomic_directory
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.vision.directory import write_json
from llm2clip_plugin.vision.publish import LICENSE

KEY = "llm2clip_export"  # in config.json: from what it was made
CARD = "llm2clip_tower.json"  # the tower's card; as llm2clip.json it would make the folder a tower directory
TEMPLATE = "chat_template.jinja"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "keep": None}


@dataclass(frozen=True, kw_only=True)
class Export:
    """What is exported, and how; everything that can be wrong with it is found before anything is written."""

    checkpoint: LlavaCheckpoint
    tower: vision.ExportedTower
    conversation: str  # a name of LLaVA's
    dtype: str  # fp16 | bf16 | fp32 | keep: each tensor's own

    @classmethod
    def of(
        cls, directory: Path, *, base: Path | None = None, tower: str = "", conv_mode: str = "", dtype: str = "fp16"
    ) -> "Export":
        """``base``: of a LoRA or projector checkpoint. Raises ValueError or FileNotFoundError for what is wrong."""
        checkpoint = open_checkpoint(directory, base)
        language.check_settings(checkpoint.config)
        recorded = str(checkpoint.config.get(CONVERSATION, "plain" if checkpoint.kind == "projector" else ""))
        return cls(
            checkpoint=checkpoint,
            tower=vision.find(checkpoint, tower),
            conversation=conversation.choose(conv_mode, recorded, where=directory),
            dtype=dtype,
        )

    @property
    def pads(self) -> bool:
        """Images are padded to squares instead of cropped."""
        return self.checkpoint.config.get("image_aspect_ratio") == "pad"

    def describe(self) -> str:
        """One line: what is exported, and how."""
        tower, kind = self.tower, self.checkpoint.kind
        images = "padded to squares" if self.pads else "cropped"
        base = f" on {self.checkpoint.base}" if self.checkpoint.base else ""
        return (
            f"{kind} checkpoint{base}, {tower.family.name} tower at {tower.config['image_size']} px, images {images}, "
            f"conversation {self.conversation}"
        )

    def write(self, directory: Path) -> int:
        """Write every file into an empty folder; the bytes of the weights."""
        config, tower = self.checkpoint.config, self.tower
        tokenizer = read_tokenizer(self.checkpoint.language_model)
        image_id = write_tokenizer(tokenizer, directory, max_length=config.get("tokenizer_model_max_length"))
        with ExitStack() as files:
            own = checkpoint_tensors(self.checkpoint, files)
            tensors = language.language_tensors(own, config, image_id, self.checkpoint.directory)
            unfrozen = bool(config.get("unfreeze_mm_vision_tower"))
            tensors |= vision.tower_tensors(tower, own, unfrozen=unfrozen, files=files)
            size = write_shards(tensors, directory, DTYPES[self.dtype])
        chosen = vision.strategy(tower, config)
        auto_map = write_code(tower.family.name, directory)
        own_code = {"auto_map": auto_map} if auto_map else {}
        write_json(directory / "config.json", self.model_config(image_id, chosen) | own_code)
        write_json(directory / "generation_config.json", {**self.special_ids(tokenizer), "do_sample": False})
        write_json(directory / "preprocessor_config.json", vision.image_processor(tower, pads=self.pads))
        processor = {"processor_class": "LlavaProcessor", "image_token": conversation.IMAGE}
        processor |= {name: value for name, value in chosen.items() if name != "image_seq_length"}
        write_json(directory / "processor_config.json", {**processor, "patch_size": tower.config["patch_size"]})
        talk = conversation.conversation_named(self.conversation)
        template = talk.served_template(bos=tokenizer.adds_bos, space=not tokenizer.legacy)
        (directory / TEMPLATE).write_text(template, encoding="utf-8")
        if tower.card:
            tower.card.write(directory / CARD)
        kind = tower.config["model_type"]
        card = model_card(self.provenance(), tower.card, model_type=kind, own_code=bool(auto_map))
        (directory / "README.md").write_text(card, encoding="utf-8")
        return size

    def model_config(self, image_id: int, chosen: dict[str, Any]) -> dict[str, Any]:
        """config.json."""
        config = self.checkpoint.config
        chosen_dtype = DTYPES[self.dtype]
        dtype = str(chosen_dtype or config.get("torch_dtype") or config.get("dtype") or "float16").removeprefix(
            "torch."
        )
        text = language.text_config(config, image_id + 1)
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": image_id,
            "image_seq_length": chosen["image_seq_length"],
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "vision_feature_layer": config["mm_vision_select_layer"],
            "vision_feature_select_strategy": chosen["vision_feature_select_strategy"],
            "text_config": {**text, "torch_dtype": dtype},
            "vision_config": {**self.tower.config, "torch_dtype": dtype},
            "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
            **{name: text[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id") if name in text},
            "torch_dtype": dtype,
            **self.tower_record(),
            KEY: self.provenance(),
        }

    def tower_record(self) -> dict[str, Any]:
        """As in LLaVA's config.json, without paths of this machine."""
        location, width = self.tower.location, self.tower.config["hidden_size"]
        if location is None or self.tower.card is None:
            return {}
        record = tower_record(replace(location, origin=self.tower.card.origin), "llm2clip", width)
        return {TOWER_KEY: record}

    def special_ids(self, tokenizer: Any) -> dict[str, int]:
        """Of generation_config.json: the ids of the tokenizer's special tokens."""
        ids = {name: tokenizer.id_of(name.removesuffix("_id")) for name in ("bos_token_id", "eos_token_id")}
        pad = tokenizer.id_of("pad_token")
        ids["pad_token_id"] = tokenizer.id_of("unk_token") if pad is None else pad
        return {name: number for name, number in ids.items() if number is not None}

    def provenance(self) -> dict[str, Any]:
        """From what the model was made, without paths of this machine."""
        return {
            "version": llm2clip_plugin.__version__,
            "checkpoint": self.checkpoint.directory.resolve().name,
            "kind": self.checkpoint.kind,
            "base_model": self.checkpoint.base.resolve().name if self.checkpoint.base else "",
            "conversation": self.conversation,
            "image_aspect_ratio": self.checkpoint.config.get("image_aspect_ratio") or "square",
            "dtype": self.dtype,
            "tower_sha256": self.tower.location.sha256 if self.tower.location else "",
        }


def export(made: Export, output: Path, *, overwrite: bool = False, verify: Any = None) -> int:
    """Write ``made`` to ``output``, completely or not at all; the bytes of its weights.

    ``verify``: called with the written folder before it gets its name. Raises FileExistsError if the folder is not
    empty, and what ``verify`` raises.
    """
    with atomic_directory(output, replace=overwrite) as temporary:
        size = made.write(temporary)
        if verify is not None:
            verify(temporary)
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


def model_card(made: dict[str, Any], tower: TowerCard | None, *, model_type: str, own_code: bool) -> str:
    """Markdown with the Hub's front matter.

    ``made``: the provenance that config.json records; ``model_type``: of the tower; ``own_code``: the tower's code is
    saved with the model.
    """
    rows = {
        "made from": f"the LLaVA 1.5 checkpoint `{made['checkpoint']}` ({made['kind']})",
        "base model": f"`{made['base_model']}`" if made["base_model"] else "",
        "conversation": f"`{made['conversation']}`",
        "images": "padded to squares" if made["image_aspect_ratio"] == "pad" else "resized, center-cropped",
        "dtype": made["dtype"],
    }
    if tower:
        rows["vision tower"] = f"{tower.family}, {tower.image_size} px, started from `{tower.origin}`"
        rows["SHA-256 of the tower"] = f"`{tower.weights_sha256}`"
        rows["tower's teacher LLM"] = f"`{tower.teacher['llm']}`" if tower.teacher.get("llm") else ""
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value), ""]
    head = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text", "license: other"]
    head += ["tags:", "- llava", "- llm2clip", "---", "", f"# {made['checkpoint']}", ""]
    kind = "LLaVA 1.5 with an LLM2CLIP vision tower" if tower else "LLaVA 1.5"
    use = USE.replace("OPTION", OPTION if own_code else "")
    use += f"{SERVED}{'' if model_type in STOCK else PLUGIN}\n"
    return "\n".join([*head, f"{kind}, exported by llm2clip-plugin.", "", *table, *LICENSE, use])


# Compare an exported model with LLaVA's own code on the same checkpoint: one question about one image.

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
