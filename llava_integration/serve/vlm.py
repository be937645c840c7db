"""A new vision-language model of any tower and any language model, as a Hugging Face folder: ``llm2clip vlm build``.

The projector is fresh, so the model has yet to be trained (stage 0). As in ``llava export``, the weights pass through
the memory of one shard under the names that servers know, and code of the tower's is saved with them.

Shape letters: N tokens of a tile of the image, H the tower's width, T tokens, D the LLM's width, V its vocabulary.
"""

import json
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import llm2clip_plugin
from llava_integration.serve.build import EMBEDDING, HEAD, OF_THE_FILE, ExportedTower, hf_name, register, with_image_row
from llava_integration.serve.checkpoint import LazyTensors, in_memory, open_tensors, write_shards
from llava_integration.serve.export import TEMPLATE, page, test_image
from llava_integration.serve.prompt import CONFIG, FAST, IMAGE
from llava_integration.serve.vlm_config import COMMAND, VlmConfig
from llava_integration.towers import TowerLocation, is_ours, locate, locate_spec, registry
from llm2clip_plugin.console import quiet_transformers
from llm2clip_plugin.contracts import atomic_directory, files_sha256
from llm2clip_plugin.files import ContractError, errors_about
from llm2clip_plugin.vision.directory import fetch_directory, has_card, is_local, read_json, weight_files, write_json
from llm2clip_plugin.vision.export import RELATIVE_TOLERANCE
from llm2clip_plugin.vision.towers import load_tower

GIB = 1 << 30
KEY = "llm2clip_vlm"  # in config.json: of what it was made
VIDEO = "<video>"
ONEVISION = "llava_onevision"
CLASSES = {"llava": "Llava", "llava_next": "LlavaNext", ONEVISION: "LlavaOnevision"}  # how their names begin
TILES = {  # grids of tiles (rows, columns) that an image may be cut into
    "llava_next": ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
    ONEVISION: tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7)),
}
MOST_TILES = {"vision_aspect_ratio": "anyres_max_9"}  # of OneVision; features of more are interpolated

# settings of a head that transformers' LLaVA doesn't have -> values that change nothing
HEAD_SETTINGS = {"final_logit_softcapping": (None,), "logit_scale": (None, 1.0), "logits_scaling": (None, 1.0)}
PADDING = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "<unk>")  # for tokenizers that name none
PROBE = "What is in this picture?"


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A folder with a decoder that transformers' LLaVA can have."""

    directory: Path
    config: Any  # transformers'
    tokenizer: Any

    @classmethod
    def of(cls, name: str) -> "LanguageModel":
        """A folder or Hub id. Raises FileNotFoundError or ValueError for one that LLaVA cannot have."""
        directory = fetch_directory(name, also=("*.jinja", "*.model", "*.txt"))
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(f"--llm {name} has no config.json; expected the folder of a Hugging Face model")
        fields = read_json(directory / "config.json")
        what = f"--llm {name} (model_type {fields.get('model_type')!r})"
        if "vision_config" in fields or "text_config" in fields:
            raise ContractError(f"{what} has a vision tower already; pass a language model")
        if fields.get("quantization_config"):
            raise ContractError(f"{what} is quantized; pass the model that it was made from")
        with errors_about(what, fix="pass a model of transformers with its tokenizer"), quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(directory)
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
            raise ContractError(f"{what} is no decoder that AutoModelForCausalLM opens; pass another")
        for setting, values in HEAD_SETTINGS.items():
            if (value := getattr(config, setting, None)) not in values:
                raise ContractError(f"{what} has {setting} {value}, which transformers' LLaVA does not apply")
        if not tokenizer.is_fast:
            raise ContractError(f"{what} has no fast tokenizer (tokenizer.json); convert it first")
        return cls(directory=directory, config=config, tokenizer=tokenizer)

    def tensors(self, files: ExitStack) -> LazyTensors:
        """Its tensors, without a tied head. Raises ContractError for names that LLaVA's classes do not have."""
        own, is_tied = open_tensors(self.directory, files), self.config.tie_word_embeddings
        own = {name: tensor for name, tensor in own.items() if not (name == HEAD and is_tied)}
        wrong = [f"has a tensor {name}" for name in own if name != HEAD and not name.startswith("model.")]
        wrong += [f"lacks {name}" for name in (EMBEDDING, *([] if is_tied else [HEAD])) if name not in own]
        if wrong:
            raise ContractError(f"{self.directory} {wrong[0]}; transformers' LLaVA loads model.* and {HEAD}")
        return own


# The chat template and the tokenizer. A template begins with the LLM's <s>, if it has one, and the tokenizer adds none:
# a prompt has exactly one in transformers, in vLLM and in trainers.

# Messages whose content is a list of parts become messages of text, which every LLM's template reads.
FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is defined and message['content'] is not none and message['content'] is not string -%}
{%- set parts = namespace(text='') -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{%- set parts.text = parts.text + part['text'] -%}
{%- else -%}{%- set parts.text = parts.text + ('<video>\\n' if 'video' in part['type'] else '<image>\\n') -%}
{%- endif -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=parts.text)] -%}
{%- else -%}{%- set flat.messages = flat.messages + [message] -%}{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


def chat_template(llm: LanguageModel, file: Path | None) -> str:
    """The LLM's template, or that in ``file``, with a slot for images. Raises ValueError without a usable one."""
    tokenizer, bos = llm.tokenizer, llm.tokenizer.bos_token
    own = tokenizer.chat_template if file is None else file.read_text(encoding="utf-8")
    if not (own := own.get("default") if isinstance(own, dict) else own):
        raise ValueError(
            f"{llm.directory} has no chat template; pass the instruction-tuned model as --llm, or --chat-template FILE"
        )
    with errors_about(file or f"the chat template of {llm.directory}", fix="pass another with --chat-template FILE"):
        chat = [{"role": "user", "content": PROBE}]
        rendered = tokenizer.apply_chat_template(chat, chat_template=own, tokenize=False, add_generation_prompt=True)
    adds = bos is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    start = "" if not adds or rendered.startswith(bos) else "{{- bos_token -}}\n"
    return FLATTEN + start + own.lstrip("\n")


def write_tokenizer(llm: LanguageModel, directory: Path, added: list[str], processor: str) -> list[int]:
    """Write the LLM's tokenizer with the tokens ``added`` and without a template of its own; the ids of ``added``."""
    from tokenizers import AddedToken, Tokenizer

    own, body = llm.tokenizer, json.loads(llm.tokenizer.backend_tokenizer.to_str())
    steps = body["post_processor"] or {}
    steps = [one for one in steps.get("processors", [steps]) if one and one["type"] != "TemplateProcessing"]
    body["post_processor"] = {"type": "Sequence", "processors": steps} if steps else None
    made = Tokenizer.from_str(json.dumps(body))
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in added])
    if len(made.encode("x").ids) != len(made.encode("x", add_special_tokens=False).ids):
        raise ContractError(f"{llm.directory}: the tokenizer adds tokens by {steps}, which cannot be changed here")
    made.save(str(directory / FAST))
    known = made.get_vocab(with_added_tokens=True)
    special = {name: getattr(own, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    special["pad_token"] = special["pad_token"] or next((t for t in PADDING if t in known), special["eos_token"])
    config = {
        **{name: token for name, token in special.items() if token is not None},
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is
        "processor_class": processor,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": own.model_max_length,
        "padding_side": "left",  # of prompts
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / CONFIG, config)
    return [known[token] for token in added]


# The model


def open_tower(name: str) -> ExportedTower:
    """A tower directory, registered name or Hub id, ``llm2clip[:...]``, or a stock Hugging Face checkpoint."""
    location = locate(name) if is_ours(name) else None
    if name in registry().towers:
        location = location or locate_spec(name, how=f"--tower {name}")
    directory = location.directory if location else fetch_directory(name)
    if has_card(directory):
        location = location or TowerLocation.of(directory, how=f"--tower {name}", origin=name)  # of the Hub
        location.check_weights()
    return ExportedTower.of(directory, location)


@dataclass(frozen=True, kw_only=True)
class Vlm:
    """What is built; everything that can be wrong with it is found before anything is written."""

    config: VlmConfig
    tower: ExportedTower
    llm: LanguageModel
    template: str
    classes: str  # how the names of transformers' classes begin

    @classmethod
    def of(cls, config: VlmConfig) -> "Vlm":
        """Raises ValueError or FileNotFoundError for what is wrong."""
        tower = open_tower(config.tower)
        width = tower.config["hidden_size"]
        tower.check_fit({"mm_vision_select_layer": config.select_layer, "mm_hidden_size": width}, tower.directory)
        llm = LanguageModel.of(config.llm)
        template = chat_template(llm, config.chat_template)
        return cls(config=config, tower=tower, llm=llm, template=template, classes=CLASSES[config.arch])

    def fresh(self) -> tuple[nn.Sequential, dict[str, Tensor]]:
        """The projector as LLaVA draws it, and what is added between rows of tiles; the same for the same seed."""
        width, out = self.tower.config["hidden_size"], self.llm.config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            projector = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
            newline = torch.randn(out) / math.sqrt(out)
        return projector, {"image_newline": newline} if self.config.arch in TILES else {}

    def parts(self, files: ExitStack) -> tuple[dict[str, LazyTensors], torch.dtype]:
        """Every tensor by part, before ``<image>`` is added; the dtype of the language model."""
        projector, newline = self.fresh()
        fresh = {hf_name(f"model.mm_projector.{name}"): value for name, value in projector.state_dict().items()}
        own = self.llm.tensors(files)
        parts = {
            "tower": self.tower.tensors({}, unfrozen=False, files=files),
            "projector": in_memory(fresh | newline, "the projector"),
            "language model": {hf_name(name): tensor for name, tensor in own.items()},
        }
        return parts, self.llm.config.dtype or next(iter(own.values())).read().dtype

    def plan(self) -> str:
        """Parameters and bytes of the parts, from the headers of their files."""
        with ExitStack() as files:
            parts, dtype = self.parts(files)
            counts = {part: sum(math.prod(t.shape) for t in tensors.values()) for part, tensors in parts.items()}
        rows = [*counts.items(), ("all", sum(counts.values()))]
        lines = [f"{part:<16}{count:>16,} parameters{count * dtype.itemsize / GIB:>10.3f} GiB" for part, count in rows]
        return "\n".join([*lines, f"{self.config.arch}, {str(dtype).removeprefix('torch.')}; nothing was written"])

    def made_from(self) -> dict[str, Any]:
        """What config.json records, without paths of this machine."""
        tower, names = self.tower, {"tower": self.config.tower, "llm": self.config.llm}
        return {
            "version": llm2clip_plugin.__version__,
            "seed": self.config.seed,
            **{part: Path(name).resolve().name if is_local(name) else name for part, name in names.items()},
            "tower_sha256": tower.location.sha256 if tower.location else files_sha256(weight_files(tower.directory)),
            "llm_sha256": files_sha256(weight_files(self.llm.directory)),
        }


def write_model(vlm: Vlm, directory: Path) -> int:
    """Write every file into an empty folder; the bytes of the weights."""
    arch, llm, tower, processor = vlm.config.arch, vlm.llm, vlm.tower, f"{vlm.classes}Processor"
    added = [IMAGE, VIDEO] if arch == ONEVISION else [IMAGE]
    ids = write_tokenizer(llm, directory, added, processor)
    (directory / TEMPLATE).write_text(vlm.template, encoding="utf-8")
    rows, needed = llm.config.vocab_size, max(ids) + 1
    with ExitStack() as files:
        parts, dtype = vlm.parts(files)
        tensors = {name: tensor for part in parts.values() for name, tensor in part.items()}
        for name in {hf_name(EMBEDDING), hf_name(HEAD)} & {*tensors} if needed > rows else ():
            tensors[name] = with_image_row(tensors[name], rows, added=needed - rows)
        size = write_shards(tensors, directory, dtype)
    is_tied, stored = bool(llm.config.tie_word_embeddings), str(dtype).removeprefix("torch.")
    fields = read_json(llm.directory / "config.json")
    text = {name: value for name, value in fields.items() if name not in OF_THE_FILE - {"architectures"}}
    text |= {"vocab_size": max(needed, rows), "torch_dtype": stored, "tie_word_embeddings": is_tied}
    special = {name: getattr(llm.config, name, None) for name in ("bos_token_id", "eos_token_id")}
    special["pad_token_id"] = transformers.AutoTokenizer.from_pretrained(directory).pad_token_id
    images, counts = images_and_counts(vlm)
    body = {
        **tower.settings(directory, layer=vlm.config.select_layer, feature="patch", dtype=stored, arch=vlm.classes),
        "architectures": [f"{vlm.classes}ForConditionalGeneration"],
        "model_type": arch,
        **dict(zip(("image_token_index", "video_token_index"), ids, strict=False)),
        "text_config": text,
        "tie_word_embeddings": is_tied,
        "torch_dtype": stored,
        **special,
        **({"image_grid_pinpoints": images["image_grid_pinpoints"]} if arch in TILES else {}),
        **(MOST_TILES if arch == ONEVISION else {}),
        KEY: (made := vlm.made_from()),
    }
    write_json(directory / "config.json", body)
    generation = llm.directory / "generation_config.json"
    own = {n: v for n, v in read_json(generation).items() if n[0] != "_"} if generation.is_file() else {}
    write_json(directory / generation.name, {**special, **own, "pad_token_id": special["pad_token_id"]})
    write_json(directory / "preprocessor_config.json", {**images, "processor_class": processor})
    write_json(directory / "processor_config.json", {**counts, "processor_class": processor})
    if arch == ONEVISION:
        videos = {
            n: v for n, v in images.items() if n not in ("image_processor_type", "image_grid_pinpoints", "do_pad")
        }
        videos |= {"video_processor_type": f"{vlm.classes}VideoProcessor", "processor_class": processor}
        write_json(directory / "video_preprocessor_config.json", videos)
    what = f"{vlm.classes} with an untrained projector (stage 0), built by llm2clip-plugin."
    listed = {"stage": 0, **made}  # trainers copy config.json, not this page
    table, own_code = {name.replace("_", " "): f"`{value}`" for name, value in listed.items()}, "auto_map" in body
    readme = page(vlm.config.output.name, what, table, tower, own_code=own_code, served=arch == "llava")
    (directory / "README.md").write_text(readme, encoding="utf-8")
    return size


def images_and_counts(vlm: Vlm) -> tuple[dict[str, Any], dict[str, Any]]:
    """preprocessor_config.json: images padded to squares, or tiles; processor_config.json: tokens of an image."""
    arch, size, chosen = vlm.config.arch, vlm.tower.config["image_size"], vlm.tower.selection("patch")
    images = {**vlm.tower.image_processor(pads=True), "image_processor_type": f"{vlm.classes}ImageProcessor"}
    more = chosen["num_additional_image_tokens"]
    counts = {"image_token": IMAGE, "vision_feature_select_strategy": chosen["vision_feature_select_strategy"]}
    if arch in TILES:
        images["image_grid_pinpoints"] = [[rows * size, columns * size] for rows, columns in TILES[arch]]
    if arch != ONEVISION:
        return images, {**counts, "patch_size": vlm.tower.config["patch_size"], "num_additional_image_tokens": more}
    del images["crop_size"]
    images |= {"size": {"height": size, "width": size}, "do_center_crop": False}
    return images, {**counts, "num_image_tokens": chosen["image_seq_length"] + more, "video_token": VIDEO, **MOST_TILES}


def main(argv: list[str]) -> int:
    """Build an untrained vision-language model, completely or not at all."""
    vlm = Vlm.of(config := COMMAND.parse(argv))
    if config.dry_run:
        print(vlm.plan())
        return 0
    with atomic_directory(config.output, replace=config.overwrite) as temporary:
        size = write_model(vlm, temporary)
        said = f"logits within {compare(vlm, temporary):.1e} of the parts'" if config.compare else "not compared"
    print(f"{config.output}: {size / GIB:.2f} GiB of weights, every tensor verified by reloading; {said}")
    return 0


# Compare the written folder with its parts


def compare(vlm: Vlm, directory: Path) -> float:
    """The largest difference of logits from those of tower and LLM as their own libraries load them, one by one.

    In parts of the largest logit. Raises ContractError for too large a one.
    """
    register()
    with torch.inference_mode(), quiet_transformers():
        processor: Any = transformers.AutoProcessor.from_pretrained(directory)
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROBE}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=test_image(), text=prompt, return_tensors="pt")
        kind = getattr(transformers, f"{vlm.classes}ForConditionalGeneration")
        model, info = kind.from_pretrained(directory, output_loading_info=True)
        if wrong := {name: sorted(info[name]) for name in ("missing_keys", "unexpected_keys") if info[name]}:
            raise ContractError(f"transformers' {kind.__name__} does not load what was written: {wrong}")
        ours_TV, settings, dtype = model.eval()(**inputs).logits[0].float(), model.config, model.dtype
        pack = getattr(type(model.model), "pack_image_features", None)
        del model
        theirs_TV = logits_of_parts(vlm, settings, pack, inputs, dtype)
    difference = (ours_TV[:, : theirs_TV.shape[1]] - theirs_TV).abs().max() / theirs_TV.abs().max()
    if not difference <= (limit := RELATIVE_TOLERANCE[dtype]):
        raise ContractError(
            f"logits of {vlm.config.tower} with {vlm.config.llm} differ from the parts' by {difference:.1e} of the "
            f"largest (at most {limit:.0e}); transformers' {kind.__name__} computes something else with this LLM"
        )
    return difference.item()


def logits_of_parts(vlm: Vlm, settings: Any, pack: Any, inputs: Any, dtype: torch.dtype) -> Tensor:
    """Logits (T, V) of the tower's features, projected, put in place of ``<image>``, and read by the LLM.

    ``settings``: of the whole model. ``pack``: transformers' function that arranges the features of tiles.
    """
    projector, newline = vlm.fresh()
    tower = load_tower(vlm.tower.directory, dtype=dtype)
    pixels = inputs["pixel_values"].to(dtype).flatten(0, -4)
    states_NH = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[vlm.config.select_layer]
    if settings.vision_feature_select_strategy == "default":
        states_NH = states_NH[:, 1:]
    features_ND = projector.to(dtype)(states_NH)
    if pack is not None:
        options = {"image_newline": newline["image_newline"].to(dtype)}
        options |= {} if vlm.config.arch == ONEVISION else {"vision_feature_select_strategy": "full"}
        features_ND = pack(SimpleNamespace(config=settings), [features_ND], inputs["image_sizes"], **options)[0][0]
    llm: Any = transformers.AutoModelForCausalLM.from_pretrained(vlm.llm.directory, torch_dtype=dtype).eval()
    is_image_1T = inputs["input_ids"] == settings.image_token_index
    embedded_1TD = llm.get_input_embeddings()(inputs["input_ids"].masked_fill(is_image_1T, 0))
    embedded_1TD[is_image_1T] = features_ND.flatten(0, -2)
    return llm(inputs_embeds=embedded_1TD, attention_mask=inputs["attention_mask"]).logits[0].float()
