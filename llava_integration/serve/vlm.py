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
from llava_integration.serve.export import QUESTION, question_with_image, test_image
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
            value = getattr(config, setting, None)
            if value not in values:
                raise ContractError(
                    f"{what} has {setting} {value}, which transformers' LLaVA does not apply"
                )
        return cls(directory=directory, config=config, tokenizer=tokenizer)

    def tensors(self, files: ExitStack) -> LazyTensors:
        """Its tensors, without a tied head. Raises ContractError for names that LLaVA's classes do
        not have."""
        stored = open_tensors(weight_files(self.directory), files)
        needed = [build.EMBEDDING]
        if self.config.tie_word_embeddings:
            stored.pop(build.HEAD, None)
        else:
            needed.append(build.HEAD)
        problems = []
        for name in stored:
            if name != build.HEAD and not name.startswith("model."):
                problems.append(f"has a tensor {name}")
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
    template = tokenizer.chat_template
    if file is not None:
        template = file.read_text(encoding="utf-8")
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
    start = ""
    if bos is not None and not rendered.startswith(bos):
        first_ids = tokenizer("x")["input_ids"][:1]
        if first_ids == [tokenizer.bos_token_id]:
            start = "{{- bos_token -}}\n"
    return FLATTEN + start + template.lstrip("\n")


def write_llms_tokenizer(
    llm: LanguageModel, directory: Path, arch: str
) -> dict[str, int]:
    """Write the LLM's tokenizer with ``<image>``, and without a template of its own;
    image_token_index and the like."""
    from tokenizers import AddedToken, Tokenizer

    llms_tokenizer = llm.tokenizer
    body = json.loads(llm.tokenizer.backend_tokenizer.to_str())
    steps = steps_without_template(body["post_processor"])
    body["post_processor"] = None
    if steps:
        body["post_processor"] = {"type": "Sequence", "processors": steps}
    tokenizer = Tokenizer.from_str(json.dumps(body))
    slots = {"image_token_index": IMAGE}
    if arch == build.ONEVISION:
        slots["video_token_index"] = build.VIDEO
    for token in slots.values():
        added = AddedToken(token, normalized=False, special=True)
        tokenizer.add_special_tokens([added])
    plain = tokenizer.encode("x", add_special_tokens=False)
    if len(tokenizer.encode("x").ids) != len(plain.ids):
        raise ContractError(
            f"{llm.directory}: the tokenizer adds tokens by {steps}, which cannot be changed here"
        )
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    special = {
        "bos_token": llms_tokenizer.bos_token,
        "eos_token": llms_tokenizer.eos_token,
        "unk_token": llms_tokenizer.unk_token,
        "pad_token": llms_tokenizer.pad_token,
    }
    if not special["pad_token"]:
        padding = [token for token in PADDING if token in vocabulary]
        special["pad_token"] = padding[0] if padding else special["eos_token"]
    settings = {name: token for name, token in special.items() if token is not None}
    settings["model_max_length"] = llms_tokenizer.model_max_length
    processor = f"{build.CLASSES[arch]}Processor"
    write_tokenizer(directory, json.loads(tokenizer.to_str()), settings, processor)
    return {name: vocabulary[token] for name, token in slots.items()}


def steps_without_template(post_processor: dict[str, Any] | None) -> list[Any]:
    """The steps of a tokenizer's post-processor but those that write tokens of their own."""
    if not post_processor:
        return []
    steps = post_processor.get("processors", [post_processor])
    return [step for step in steps if step and step["type"] != "TemplateProcessing"]


# The model


def open_tower(name: str) -> ExportedTower:
    """A tower directory, registered name or Hub id, ``llm2clip[:...]``, or a stock Hugging Face
    checkpoint."""
    how = f"--tower {name}"
    location = None
    if name in registry().towers:
        location = locate_spec(name, how=how)
    if is_ours(name):
        location = locate(name)
    directory = location.directory if location else fetch_directory(name)
    if has_card(directory):
        if location is None:  # of the Hub
            location = TowerLocation.of(directory, how=how, origin=name)
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
    new = {}
    for name, value in projector.state_dict().items():
        new[hf_name(f"model.mm_projector.{name}")] = value
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
    dtype = llm.config.dtype
    if not dtype:
        first_tensor = next(iter(llm_tensors.values()))
        dtype = first_tensor.read().dtype
    return by_part, dtype


def plan(config: VlmConfig, tower: ExportedTower, llm: LanguageModel) -> str:
    """Parameters and bytes of the parts, from the headers of their files."""
    with ExitStack() as files:
        by_part, dtype = parts(config, tower, llm, files)
        counts = {part: parameters(tensors) for part, tensors in by_part.items()}
    lines = []
    for part, count in (*counts.items(), ("all", sum(counts.values()))):
        size = size_text(count * dtype.itemsize)
        lines.append(f"{part:<16}{count:>16,} parameters{size:>12}")
    dtype_name = str(dtype).removeprefix("torch.")
    lines.append(f"{config.arch}, {dtype_name}; nothing was written")
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
    written_tokenizer = open_pretrained(transformers.AutoTokenizer, directory)
    ids = {
        "bos_token_id": getattr(llm.config, "bos_token_id", None),
        "eos_token_id": getattr(llm.config, "eos_token_id", None),
        "pad_token_id": written_tokenizer.pad_token_id,
    }
    text = llms_config(llm)
    text["vocab_size"] = max(needed, rows)
    text["tie_word_embeddings"] = is_tied
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
            text=text,
            slots=slots,
            ids=ids,
            generation=llms_generation(llm),
            template=template,
        )


def llms_config(llm: LanguageModel) -> dict[str, Any]:
    """The LLM's config.json without what describes its file."""
    left_out = build.OF_THE_FILE - {"architectures"}
    config = read_json(llm.directory / "config.json")
    return {name: value for name, value in config.items() if name not in left_out}


def llms_generation(llm: LanguageModel) -> dict[str, Any]:
    """The LLM's generation_config.json, if it has one, but for the padding."""
    file = llm.directory / "generation_config.json"
    if not file.is_file():
        return {}
    settings = {}
    for name, value in read_json(file).items():
        if not name.startswith("_") and name != "pad_token_id":
            settings[name] = value
    return settings


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
        prompt = processor.apply_chat_template(
            question_with_image(), add_generation_prompt=True
        )
        inputs = processor(images=test_image(), text=prompt, return_tensors="pt")
        model_class = getattr(
            transformers, f"{build.CLASSES[config.arch]}ForConditionalGeneration"
        )
        whole = run_whole(model_class, directory, inputs)
        features = features_alone(config, tower, inputs, whole)
        logits_1TV = logits_alone(llm, inputs, whole)
    limit = RELATIVE_TOLERANCE[whole.dtype]
    feature_difference = relative_difference(whole.features, features)
    vocabulary = logits_1TV.shape[-1]
    logit_difference = relative_difference(
        whole.logits_1TV[..., :vocabulary], logits_1TV
    )
    differences = [feature_difference, logit_difference]
    if not max(differences) <= limit:
        raise ContractError(
            f"features and logits of {config.tower} with {config.llm} differ from the parts' by "
            f"{differences} of the largest (at most {limit:.0e}); "
            f"transformers' {model_class.__name__} computes something else with this LLM"
        )
    return logit_difference


@dataclass(frozen=True, kw_only=True)
class WholeRun:
    """What the written model computes on a prompt with an image."""

    config: Any  # transformers'
    dtype: torch.dtype
    features: torch.Tensor  # that the projector reads
    embedded_1TD: torch.Tensor  # that the language model reads
    logits_1TV: torch.Tensor


def run_whole(model_class: Any, directory: Path, inputs: Any) -> WholeRun:
    """Load the written model and run it. Raises ContractError if transformers knows other
    tensors."""
    model, info = model_class.from_pretrained(directory, output_loading_info=True)
    wrong = {}
    for name in ("missing_keys", "unexpected_keys"):
        if info[name]:
            wrong[name] = sorted(info[name])
    if wrong:
        raise ContractError(
            f"transformers' {model_class.__name__} does not load what was written: {wrong}"
        )
    seen: dict[str, Any] = {}

    def see_features(module: nn.Module, arguments: Any) -> None:
        seen["features"] = arguments[0]

    def see_embedded(module: nn.Module, arguments: Any, options: Any) -> None:
        seen["embedded"] = options["inputs_embeds"]

    inner = model.eval().model
    inner.multi_modal_projector.register_forward_pre_hook(see_features)
    inner.language_model.register_forward_pre_hook(see_embedded, with_kwargs=True)
    logits_1TV = model(**inputs).logits
    return WholeRun(
        config=model.config,
        dtype=model.dtype,
        features=seen["features"],
        embedded_1TD=seen["embedded"],
        logits_1TV=logits_1TV,
    )


def features_alone(
    config: VlmConfig, tower: ExportedTower, inputs: Any, whole: WholeRun
) -> torch.Tensor:
    """What the tower alone makes of the image."""
    pixels = inputs["pixel_values"].to(whole.dtype).flatten(0, -4)
    vision = load_tower(tower.directory, dtype=whole.dtype)
    states = vision(pixel_values=pixels, output_hidden_states=True).hidden_states
    features = states[config.select_layer]
    if whole.config.vision_feature_select_strategy == "default":
        return features[:, 1:]  # without the class token
    return features


def logits_alone(llm: LanguageModel, inputs: Any, whole: WholeRun) -> torch.Tensor:
    """What the language model alone makes of the prompt with the image's embeddings."""
    alone = open_pretrained(
        transformers.AutoModelForCausalLM, llm.directory, torch_dtype=whole.dtype
    ).eval()
    ids_1T = inputs["input_ids"]
    is_image_1T = ids_1T == whole.config.image_token_index
    embed = alone.get_input_embeddings()
    embedded_1TD = embed(ids_1T.masked_fill(is_image_1T, 0))
    embedded_1TD[is_image_1T] = whole.embedded_1TD[is_image_1T]
    return alone(
        inputs_embeds=embedded_1TD, attention_mask=inputs["attention_mask"]
    ).logits


def relative_difference(mine: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in parts of the largest value."""
    return ((mine - expected).abs().max() / expected.abs().max()).item()
