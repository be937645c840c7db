"""A new vision-language model of any tower and any language model, as a Hugging Face folder:
``llm2clip vlm build``.

The projector is fresh, so the model has yet to be trained (stage 0). As in ``llava export``, the
weights pass through the memory of one shard under the names that servers know, and code of the
tower's is saved with them.

Shape letters: N tokens of a tile of the image, H the tower's width, T tokens, D the LLM's width, V
its vocabulary.
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

from llava_integration.plug.checkpoints import blocks_below
from llava_integration.plug.towers import (
    TowerLocation,
    is_ours,
    locate,
    locate_spec,
    registry,
)
from llava_integration.serve import VLM, VlmConfig, build
from llava_integration.serve.build import (
    ExportedTower,
    hf_name,
    register,
    with_image_row,
    write_folder,
)
from llava_integration.serve.checkpoint import LazyTensors, in_memory, open_tensors
from llava_integration.serve.export import QUESTION, test_image
from llava_integration.serve.prompt import IMAGE, write_tokenizer
from llm2clip_plugin.atomic import size_text
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.folders import MODEL_FOLDER, output_folder
from llm2clip_plugin.hashes import files_sha256
from llm2clip_plugin.pretrained import KNOWN, check_vocabulary, open_pretrained
from llm2clip_plugin.quiet import quiet_transformers
from llm2clip_plugin.vision.directory import (
    fetch_directory,
    has_card,
    is_local,
    read_json,
    weight_files,
)
from llm2clip_plugin.vision.export import RELATIVE_TOLERANCE
from llm2clip_plugin.vision.towers import load_tower

# settings of a head that transformers' LLaVA doesn't have -> values that change nothing
HEAD_SETTINGS = {
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
}
# for tokenizers that name none
PADDING = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "<unk>")


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A folder with a decoder that transformers' LLaVA can have."""

    directory: Path
    config: Any  # transformers'
    tokenizer: Any

    @classmethod
    def of(cls, name: str) -> "LanguageModel":
        """A folder or Hub id. Raises FileNotFoundError or ValueError for one that LLaVA cannot
        have."""
        directory = fetch_directory(name, also=("*.jinja", "*.model", "*.txt"))
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(
                f"--llm {name} has no config.json; expected the folder of a Hugging Face model"
            )
        fields = read_json(directory / "config.json")
        what = f"--llm {name} (model_type {fields.get('model_type')!r})"
        if "vision_config" in fields or "text_config" in fields:
            raise ContractError(
                f"{what} has a vision tower already; pass a language model"
            )
        if fields.get("quantization_config"):
            raise ContractError(
                f"{what} is quantized; pass the model that it was made from"
            )
        with (
            errors_about(what, fix="pass a model of transformers with its tokenizer"),
            quiet_transformers(),
        ):
            config = open_pretrained(transformers.AutoConfig, directory, fix=KNOWN)
            tokenizer = open_pretrained(
                transformers.AutoTokenizer, directory, fix=KNOWN
            )
        check_vocabulary(tokenizer, config.vocab_size, what)
        for setting, values in HEAD_SETTINGS.items():
            if (value := getattr(config, setting, None)) not in values:
                raise ContractError(
                    f"{what} has {setting} {value}, which transformers' LLaVA does not apply"
                )
        return cls(directory=directory, config=config, tokenizer=tokenizer)

    def tensors(self, files: ExitStack) -> LazyTensors:
        """Its tensors, without a tied head. Raises ContractError for names that LLaVA's classes do
        not have."""
        stored = open_tensors(weight_files(self.directory), files)
        is_tied = self.config.tie_word_embeddings
        stored = {
            name: tensor
            for name, tensor in stored.items()
            if not (name == build.HEAD and is_tied)
        }
        needed = [build.EMBEDDING] if is_tied else [build.EMBEDDING, build.HEAD]
        unknown = [
            name
            for name in stored
            if name != build.HEAD and not name.startswith("model.")
        ]
        problems = [f"has a tensor {name}" for name in unknown]
        problems += [f"lacks {name}" for name in needed if name not in stored]
        if problems:
            raise ContractError(
                f"{self.directory} {problems[0]}; "
                f"transformers' LLaVA loads model.* and {build.HEAD}"
            )
        return stored


# The chat template and the tokenizer. A template begins with the LLM's <s>, if it has one, and the
# tokenizer adds none: a prompt has exactly one in transformers, in vLLM and in trainers.

# Messages whose content is a list of parts become messages of text, which every LLM's template
# reads.
FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}{%- set content = message['content'] -%}
{%- if content is defined and content is not none and content is not string -%}
{%- set parts = namespace(text='') -%}
{%- for part in content -%}\
{%- set tag = '<video>\\n' if 'video' in part['type'] else '<image>\\n' -%}
{%- set parts.text = parts.text + (part['text'] if part['type'] == 'text' else tag) -%}\
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=parts.text)] -%}
{%- else -%}{%- set flat.messages = flat.messages + [message] -%}{%- endif -%}{%- endfor -%}
{%- set messages = flat.messages -%}
"""


def chat_template(llm: LanguageModel, file: Path | None) -> str:
    """The LLM's template, or that in ``file``, with a slot for images. Raises ValueError without a
    usable one."""
    tokenizer = llm.tokenizer
    bos = llm.tokenizer.bos_token
    template = (
        tokenizer.chat_template if file is None else file.read_text(encoding="utf-8")
    )
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ValueError(
            f"{llm.directory} has no chat template; "
            "pass the instruction-tuned model as --llm, or --chat-template FILE"
        )
    with errors_about(
        file or f"the chat template of {llm.directory}",
        fix="pass another with --chat-template FILE",
    ):
        chat = [{"role": "user", "content": QUESTION}]
        rendered = tokenizer.apply_chat_template(
            chat, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    adds = bos is not None and tokenizer("x")["input_ids"][:1] == [
        tokenizer.bos_token_id
    ]
    start = "" if not adds or rendered.startswith(bos) else "{{- bos_token -}}\n"
    return FLATTEN + start + template.lstrip("\n")


def write_llms_tokenizer(
    llm: LanguageModel, directory: Path, arch: str
) -> dict[str, int]:
    """Write the LLM's tokenizer with ``<image>``, and without a template of its own;
    image_token_index and the like."""
    from tokenizers import AddedToken, Tokenizer

    llms_tokenizer = llm.tokenizer
    body = json.loads(llm.tokenizer.backend_tokenizer.to_str())
    processor = body["post_processor"] or {}
    steps = [
        step
        for step in processor.get("processors", [processor])
        if step and step["type"] != "TemplateProcessing"
    ]
    body["post_processor"] = (
        {"type": "Sequence", "processors": steps} if steps else None
    )
    tokenizer = Tokenizer.from_str(json.dumps(body))
    slots = {"image_token_index": IMAGE}
    if arch == build.ONEVISION:
        slots["video_token_index"] = build.VIDEO
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in slots.values()]
    )
    plain = tokenizer.encode("x", add_special_tokens=False)
    if len(tokenizer.encode("x").ids) != len(plain.ids):
        raise ContractError(
            f"{llm.directory}: the tokenizer adds tokens by {steps}, which cannot be changed here"
        )
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    special = {
        name: getattr(llms_tokenizer, name)
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    if not special["pad_token"]:
        padding = (token for token in PADDING if token in vocabulary)
        special["pad_token"] = next(padding, special["eos_token"])
    settings = {name: token for name, token in special.items() if token is not None}
    settings["model_max_length"] = llms_tokenizer.model_max_length
    write_tokenizer(
        directory,
        json.loads(tokenizer.to_str()),
        settings,
        f"{build.CLASSES[arch]}Processor",
    )
    return {name: vocabulary[token] for name, token in slots.items()}


# The model


def open_tower(name: str) -> ExportedTower:
    """A tower directory, registered name or Hub id, ``llm2clip[:...]``, or a stock Hugging Face
    checkpoint."""
    how = f"--tower {name}"
    registered = locate_spec(name, how=how) if name in registry().towers else None
    location = locate(name) if is_ours(name) else registered
    directory = location.directory if location else fetch_directory(name)
    if has_card(directory):
        location = location or TowerLocation.of(
            directory, how=how, origin=name
        )  # of the Hub
        location.check_weights()
    return ExportedTower.of(directory, location)


def parts(
    config: VlmConfig, tower: ExportedTower, llm: LanguageModel, files: ExitStack
) -> tuple[dict[str, LazyTensors], torch.dtype]:
    """Every tensor by part, before ``<image>`` is added; the LLM's dtype."""
    width = tower.config["hidden_size"]
    out = llm.config.hidden_size
    with torch.random.fork_rng(devices=[]):  # the same for the same seed
        torch.manual_seed(config.seed)
        # as LLaVA draws it
        projector = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
        newline = torch.randn(out) / math.sqrt(out)  # between rows of tiles
    new = {
        hf_name(f"model.mm_projector.{name}"): value
        for name, value in projector.state_dict().items()
    }
    if config.arch in build.TILES:
        new["image_newline"] = newline
    llm_tensors = llm.tensors(files)
    by_part = {
        "tower": tower.tensors(files),
        "projector": in_memory(new, "the projector"),
        "language model": {
            hf_name(name): tensor for name, tensor in llm_tensors.items()
        },
    }
    return by_part, llm.config.dtype or next(iter(llm_tensors.values())).read().dtype


def plan(config: VlmConfig, tower: ExportedTower, llm: LanguageModel) -> str:
    """Parameters and bytes of the parts, from the headers of their files."""
    with ExitStack() as files:
        by_part, dtype = parts(config, tower, llm, files)
        counts = {part: parameters(tensors) for part, tensors in by_part.items()}
    rows = [*counts.items(), ("all", sum(counts.values()))]
    lines = [
        f"{part:<16}{count:>16,} parameters{size_text(count * dtype.itemsize):>12}"
        for part, count in rows
    ]
    lines.append(
        f"{config.arch}, {str(dtype).removeprefix('torch.')}; nothing was written"
    )
    return "\n".join(lines)


def parameters(tensors: LazyTensors) -> int:
    """The number of parameters of a part."""
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def write_model(
    config: VlmConfig,
    tower: ExportedTower,
    llm: LanguageModel,
    template: str,
    directory: Path,
) -> int:
    """Write every file into an empty folder; the bytes of the weights."""
    slots = write_llms_tokenizer(llm, directory, config.arch)
    rows = llm.config.vocab_size
    needed = max(slots.values()) + 1
    is_tied = bool(llm.config.tie_word_embeddings)
    if tower.location:
        tower_sha256 = tower.location.sha256
    else:
        tower_sha256 = files_sha256(weight_files(tower.directory))
    recorded = {
        "seed": config.seed,
        "tower": without_path(config.tower),
        "llm": without_path(config.llm),
        "tower_sha256": tower_sha256,
        "llm_sha256": files_sha256(weight_files(llm.directory)),
    }
    left_out = build.OF_THE_FILE - {"architectures"}
    text = read_json(llm.directory / "config.json")
    text = {name: value for name, value in text.items() if name not in left_out}
    file = llm.directory / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    ids = {
        name: getattr(llm.config, name, None)
        for name in ("bos_token_id", "eos_token_id")
    }
    ids["pad_token_id"] = open_pretrained(
        transformers.AutoTokenizer, directory
    ).pad_token_id
    with ExitStack() as files:
        by_part, dtype = parts(config, tower, llm, files)
        tensors: LazyTensors = {}
        for part in by_part.values():
            tensors.update(part)
        for name in (hf_name(build.EMBEDDING), hf_name(build.HEAD)):
            if needed > rows and name in tensors:
                tensors[name] = with_image_row(tensors[name], rows, added=needed - rows)
        return write_folder(
            directory,
            tower,
            tensors,
            title=config.output.name,
            what=f"{build.CLASSES[config.arch]} with an untrained projector (stage 0), "
            "built by llm2clip-plugin.",
            made_from=("llm2clip_vlm", recorded),
            arch=config.arch,
            layer=config.select_layer,
            dtype=dtype,
            text=text
            | {"vocab_size": max(needed, rows), "tie_word_embeddings": is_tied},
            slots=slots,
            ids=ids,
            generation={
                n: v
                for n, v in generation.items()
                if n[0] != "_" and n != "pad_token_id"
            },
            template=template,
        )


def without_path(name: str) -> str:
    """A folder's name without the path on this machine, or a Hub id."""
    return Path(name).resolve().name if is_local(name) else name


def main(argv: list[str]) -> int:
    """Build an untrained vision-language model, completely or not at all."""
    config = VLM.parse(argv)
    tower = open_tower(config.tower)
    blocks_below(config.select_layer, tower.config["num_hidden_layers"])
    llm = LanguageModel.of(config.llm)
    template = chat_template(llm, config.chat_template)
    if config.dry_run:
        print(plan(config, tower, llm))
        return 0
    with output_folder(
        config.output, MODEL_FOLDER, replace=config.overwrite
    ) as temporary:
        size = write_model(config, tower, llm, template, temporary)
        difference = compare(config, tower, llm, temporary) if config.compare else None
    compared = "not compared"
    if difference is not None:
        compared = f"logits within {difference:.1e} of the parts'"
    weights = f"{size_text(size)} of weights, every tensor verified by reloading"
    print(f"{config.output}: {weights}; {compared}")
    return 0


def compare(
    config: VlmConfig, tower: ExportedTower, llm: LanguageModel, directory: Path
) -> float:
    """The largest difference from what tower and LLM compute as their own libraries load them, one
    by one.

    Of the features that the projector reads, and of the logits, in parts of the largest. Raises
    ContractError for too large a one.
    """
    register()
    with torch.inference_mode(), quiet_transformers():
        processor = open_pretrained(transformers.AutoProcessor, directory)
        chat = [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": QUESTION}],
            }
        ]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=test_image(), text=prompt, return_tensors="pt")
        kind = getattr(
            transformers, f"{build.CLASSES[config.arch]}ForConditionalGeneration"
        )
        model, info = kind.from_pretrained(directory, output_loading_info=True)
        wrong = {
            name: sorted(info[name])
            for name in ("missing_keys", "unexpected_keys")
            if info[name]
        }
        if wrong:
            raise ContractError(
                f"transformers' {kind.__name__} does not load what was written: {wrong}"
            )
        seen: dict[str, Any] = {}
        inside = model.eval().model
        inside.multi_modal_projector.register_forward_pre_hook(
            lambda _, inputs_of_projector: seen.update(features=inputs_of_projector[0])
        )
        inside.language_model.register_forward_pre_hook(
            lambda *call: seen.update(call[-1]), with_kwargs=True
        )
        logits_1TV = model(**inputs).logits
        settings = model.config
        dtype = model.dtype
        del model, inside
        pixels = inputs["pixel_values"].to(dtype).flatten(0, -4)
        states = load_tower(tower.directory, dtype=dtype)(
            pixel_values=pixels, output_hidden_states=True
        ).hidden_states
        features = states[config.select_layer]
        if settings.vision_feature_select_strategy == "default":
            features = features[:, 1:]  # without the class token
        alone = open_pretrained(
            transformers.AutoModelForCausalLM, llm.directory, torch_dtype=dtype
        ).eval()
        is_image_1T = inputs["input_ids"] == settings.image_token_index
        embedded_1TD = alone.get_input_embeddings()(
            inputs["input_ids"].masked_fill(is_image_1T, 0)
        )
        embedded_1TD[is_image_1T] = seen["inputs_embeds"][is_image_1T]
        expected_1TV = alone(
            inputs_embeds=embedded_1TD, attention_mask=inputs["attention_mask"]
        ).logits
    pairs = (
        (seen["features"], features),
        (logits_1TV[..., : expected_1TV.shape[-1]], expected_1TV),
    )
    differences = [
        ((mine - expected).abs().max() / expected.abs().max()).item()
        for mine, expected in pairs
    ]
    if not max(differences) <= (limit := RELATIVE_TOLERANCE[dtype]):
        raise ContractError(
            f"features and logits of {config.tower} with {config.llm} differ from the parts' by "
            f"{differences} of the largest (at most {limit:.0e}); "
            f"transformers' {kind.__name__} computes something else with this LLM"
        )
    return differences[1]
