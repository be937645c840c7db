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
from typing import Any

import torch
import transformers
from torch import nn

from llava_integration.checkpoints import blocks_below
from llava_integration.serve import VLM, VlmConfig
from llava_integration.serve.build import (
    CLASSES,
    EMBEDDING,
    HEAD,
    OF_THE_FILE,
    ExportedTower,
    hf_name,
    register,
    with_image_row,
    write_folder,
)
from llava_integration.serve.checkpoint import LazyTensors, in_memory, open_tensors
from llava_integration.serve.export import QUESTION, test_image
from llava_integration.serve.prompt import IMAGE, write_tokenizer
from llava_integration.towers import TowerLocation, is_ours, locate, locate_spec, registry
from llm2clip_plugin.console import quiet_transformers
from llm2clip_plugin.contracts import atomic_directory, files_sha256, size_text
from llm2clip_plugin.files import ContractError, errors_about
from llm2clip_plugin.vision.directory import fetch_directory, has_card, is_local, read_json, weight_files
from llm2clip_plugin.vision.export import RELATIVE_TOLERANCE
from llm2clip_plugin.vision.towers import load_tower

PADDING = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "<unk>")  # for tokenizers that name none


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
        return cls(directory=directory, config=config, tokenizer=tokenizer)

    def tensors(self, files: ExitStack) -> LazyTensors:
        """Its tensors, without a tied head. Raises ContractError for names that LLaVA's classes do not have."""
        own, is_tied = open_tensors(weight_files(self.directory), files), self.config.tie_word_embeddings
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
{%- else -%}{%- set parts.text = parts.text + '<image>\\n' -%}
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
        chat = [{"role": "user", "content": QUESTION}]
        rendered = tokenizer.apply_chat_template(chat, chat_template=own, tokenize=False, add_generation_prompt=True)
    adds = bos is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    start = "" if not adds or rendered.startswith(bos) else "{{- bos_token -}}\n"
    return FLATTEN + start + own.lstrip("\n")


def write_llms_tokenizer(llm: LanguageModel, directory: Path, processor: str) -> int:
    """Write the LLM's tokenizer with ``<image>``, and without a template of its own; the token's id."""
    from tokenizers import AddedToken, Tokenizer

    own, body = llm.tokenizer, json.loads(llm.tokenizer.backend_tokenizer.to_str())
    steps = body["post_processor"] or {}
    steps = [one for one in steps.get("processors", [steps]) if one and one["type"] != "TemplateProcessing"]
    body["post_processor"] = {"type": "Sequence", "processors": steps} if steps else None
    made = Tokenizer.from_str(json.dumps(body))
    made.add_special_tokens([AddedToken(IMAGE, normalized=False, special=True)])
    if len(made.encode("x").ids) != len(made.encode("x", add_special_tokens=False).ids):
        raise ContractError(f"{llm.directory}: the tokenizer adds tokens by {steps}, which cannot be changed here")
    known = made.get_vocab(with_added_tokens=True)
    special = {name: getattr(own, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    special["pad_token"] = special["pad_token"] or next((t for t in PADDING if t in known), special["eos_token"])
    settings = {name: token for name, token in special.items() if token is not None}
    settings["model_max_length"] = own.model_max_length
    write_tokenizer(directory, json.loads(made.to_str()), settings, processor)
    return known[IMAGE]


# The model


def open_tower(name: str) -> ExportedTower:
    """A tower directory, registered name or Hub id, ``llm2clip[:...]``, or a stock Hugging Face checkpoint."""
    how = f"--tower {name}"
    known = locate_spec(name, how=how) if name in registry().towers else None
    location = locate(name) if is_ours(name) else known
    directory = location.directory if location else fetch_directory(name)
    if has_card(directory):
        location = location or TowerLocation.of(directory, how=how, origin=name)  # of the Hub
        location.check_weights()
    return ExportedTower.of(directory, location)


def write_model(config: VlmConfig, tower: ExportedTower, llm: LanguageModel, directory: Path) -> int:
    """Write every file into an empty folder; the bytes of the weights."""
    image_id = write_llms_tokenizer(llm, directory, f"{CLASSES[config.arch]}Processor")
    width, out = tower.config["hidden_size"], llm.config.hidden_size
    with torch.random.fork_rng(devices=[]):  # the same for the same seed
        torch.manual_seed(config.seed)
        projector = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))  # as LLaVA draws it
        newline = torch.randn(out) / math.sqrt(out)  # between rows of tiles
    rows, needed, is_tied = llm.config.vocab_size, image_id + 1, bool(llm.config.tie_word_embeddings)
    places = {"tower": config.tower, "llm": config.llm}  # no path of this machine is recorded
    recorded = {
        "seed": config.seed,
        **{part: Path(name).resolve().name if is_local(name) else name for part, name in places.items()},
        "tower_sha256": tower.location.sha256 if tower.location else files_sha256(weight_files(tower.directory)),
        "llm_sha256": files_sha256(weight_files(llm.directory)),
    }
    text = read_json(llm.directory / "config.json")
    text = {name: value for name, value in text.items() if name not in OF_THE_FILE - {"architectures"}}
    file = llm.directory / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    ids = {name: getattr(llm.config, name, None) for name in ("bos_token_id", "eos_token_id")}
    ids["pad_token_id"] = transformers.AutoTokenizer.from_pretrained(directory).pad_token_id
    with ExitStack() as files:
        tensors = tower.tensors(files)
        new = {hf_name(f"model.mm_projector.{name}"): value for name, value in projector.state_dict().items()}
        new |= {"image_newline": newline} if config.arch == "llava_next" else {}
        tensors |= in_memory(new, "the projector")
        own = llm.tensors(files)
        tensors |= {hf_name(name): tensor for name, tensor in own.items()}
        for name in {hf_name(EMBEDDING), hf_name(HEAD)} & {*tensors} if needed > rows else ():
            tensors[name] = with_image_row(tensors[name], rows, added=needed - rows)
        return write_folder(
            directory,
            tower,
            tensors,
            title=config.output.name,
            what=f"{CLASSES[config.arch]} with an untrained projector (stage 0), built by llm2clip-plugin.",
            made_from=("llm2clip_vlm", recorded),
            arch=config.arch,
            layer=config.select_layer,
            dtype=llm.config.dtype or next(iter(own.values())).read().dtype,
            text=text | {"vocab_size": max(needed, rows), "tie_word_embeddings": is_tied},
            image_id=image_id,
            ids=ids,
            generation={n: v for n, v in generation.items() if n[0] != "_" and n != "pad_token_id"},
            template=chat_template(llm, config.chat_template),
        )


def main(argv: list[str]) -> int:
    """Build an untrained vision-language model, completely or not at all."""
    config = VLM.parse(argv)
    tower = open_tower(config.tower)
    blocks_below(config.select_layer, tower.config["num_hidden_layers"])
    llm = LanguageModel.of(config.llm)
    with atomic_directory(config.output, replace=config.overwrite) as temporary:
        size = write_model(config, tower, llm, temporary)
        said = "not compared"
        if config.compare:
            said = f"logits within {compare(config, tower, llm, temporary):.1e} of the parts'"
    print(f"{config.output}: {size_text(size)} of weights, every tensor verified by reloading; {said}")
    return 0


def compare(config: VlmConfig, tower: ExportedTower, llm: LanguageModel, directory: Path) -> float:
    """The largest difference from what tower and LLM compute as their own libraries load them, one by one.

    Of the features that the projector reads, and of the logits, in parts of the largest. Raises ContractError for too
    large a one.
    """
    register()
    with torch.inference_mode(), quiet_transformers():
        processor: Any = transformers.AutoProcessor.from_pretrained(directory)
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=test_image(), text=prompt, return_tensors="pt")
        kind = getattr(transformers, f"{CLASSES[config.arch]}ForConditionalGeneration")
        model, info = kind.from_pretrained(directory, output_loading_info=True)
        if wrong := {name: sorted(info[name]) for name in ("missing_keys", "unexpected_keys") if info[name]}:
            raise ContractError(f"transformers' {kind.__name__} does not load what was written: {wrong}")
        seen: dict[str, Any] = {}
        inside = model.eval().model
        inside.multi_modal_projector.register_forward_pre_hook(lambda _, given: seen.update(features=given[0]))
        inside.language_model.register_forward_pre_hook(lambda *call: seen.update(call[-1]), with_kwargs=True)
        logits_1TV, settings, dtype = model(**inputs).logits, model.config, model.dtype
        del model, inside
        pixels = inputs["pixel_values"].to(dtype).flatten(0, -4)
        states = load_tower(tower.directory, dtype=dtype)(pixel_values=pixels, output_hidden_states=True).hidden_states
        features = states[config.select_layer][:, int(settings.vision_feature_select_strategy == "default") :]
        alone: Any = transformers.AutoModelForCausalLM.from_pretrained(llm.directory, torch_dtype=dtype).eval()
        is_image_1T = inputs["input_ids"] == settings.image_token_index
        embedded_1TD = alone.get_input_embeddings()(inputs["input_ids"].masked_fill(is_image_1T, 0))
        embedded_1TD[is_image_1T] = seen["inputs_embeds"][is_image_1T]
        expected_1TV = alone(inputs_embeds=embedded_1TD, attention_mask=inputs["attention_mask"]).logits
    pairs = ((seen["features"], features), (logits_1TV[..., : expected_1TV.shape[-1]], expected_1TV))
    differences = [((mine - own).abs().max() / own.abs().max()).item() for mine, own in pairs]
    if not max(differences) <= (limit := RELATIVE_TOLERANCE[dtype]):
        raise ContractError(
            f"features and logits of {config.tower} with {config.llm} differ from the parts' by {differences} of the "
            f"largest (at most {limit:.0e}); transformers' {kind.__name__} computes something else with this LLM"
        )
    return differences[1]
