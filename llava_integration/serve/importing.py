"""A Hugging Face LLaVA 1.5 model, such as llava-hf/llava-1.5-7b-hf, as a LLaVA checkpoint with its tower inside.

The tower becomes a tower directory in ``vision_tower``, where loading the checkpoint finds it. Every tensor of the
model is one of the checkpoint's or of the tower's, bit for bit; only rows of the vocabulary from ``<image>`` on are
left out, which LLaVA does not have.
"""

import shutil
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_integration.hook import CONVERSATION
from llava_integration.serve import language, tokenizer
from llava_integration.serve.checkpoint import PROJECTOR_TYPE
from llava_integration.serve.export import CARD, KEY, TOWER_KEY
from llava_integration.serve.tensors import LazyTensor, LazyTensors, open_tensors, refuse_rest, write_shards
from llava_integration.serve.tower_code import family_of_vision, of_tower_directories, register
from llava_integration.towers.checkpoint_name import WORD, model_name
from llava_integration.towers.location import TowerLocation
from llava_integration.towers.provenance import BUNDLE, tower_record
from llm2clip_plugin.contracts import ContractError, TowerCard, atomic_directory, sha256_weights
from llm2clip_plugin.outside.values import errors_about, read_json_value
from llm2clip_plugin.vision.directory import PREPROCESSOR_FILE, WEIGHTS_FILE, fetch_directory, write_json
from llm2clip_plugin.vision.export import library_versions
from llm2clip_plugin.vision.family import Family
from llm2clip_plugin.vision.intact import write_checksums
from llm2clip_plugin.vision.model_card import model_card
from llm2clip_plugin.vision.preprocessor import INHERITED, preprocessor_config
from llm2clip_plugin.vision.towers import load_tower

PAD = "<pad>"  # llava-hf's token after <image>; LLaVA pads with <unk>
# prefixes of transformers 5's own files -> those that servers know
RENAMED = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


@dataclass(frozen=True, kw_only=True)
class HfModel:
    """A Hugging Face LLaVA on disk."""

    directory: Path
    origin: str  # as given: path or Hub id
    config: dict[str, Any]  # with every default filled in
    family: Family
    card: TowerCard | None  # that `export` saved

    @classmethod
    def open(cls, source: str) -> "HfModel":
        """Raises FileNotFoundError or ContractError unless ``source`` is a LLaVA 1.5 that LLaVA's code can run."""
        directory = fetch_directory(source)
        where = directory / "config.json"
        if not where.is_file():
            raise FileNotFoundError(f"{directory} is not a Hugging Face model: no config.json in it")
        body = read_json_value(where)
        if not isinstance(body, dict) or body.get("model_type") != "llava":
            kind = body.get("model_type") if isinstance(body, dict) else type(body).__name__
            raise ContractError(f"{where}: model_type is {kind!r}, expected 'llava' (LlavaForConditionalGeneration)")
        for name in ("vision_config", "text_config", KEY):
            if not isinstance(body.get(name, {}), dict):
                raise ContractError(f"{where}: {name} is a {type(body[name]).__name__}, expected an object")
        saved = directory / CARD
        card = TowerCard.read(saved) if saved.is_file() else None
        family = family_of_vision(body.get("vision_config") or {}, where=str(where), family=card.family if card else "")
        family.vision_class()  # raises if a library is too old for it
        register()
        from transformers import LlavaConfig

        with errors_about(where, fix="download the model again"):
            config = LlavaConfig.from_pretrained(directory).to_dict()
        refuse_unsupported(config, where)
        return cls(directory=directory, origin=source, config={**body, **config}, family=family, card=card)

    @property
    def tokens(self) -> int:
        """Tokens of LLaVA's vocabulary, which ends before ``<image>``."""
        return self.config["image_token_index"]


def refuse_unsupported(config: dict[str, Any], where: Path) -> None:
    """Raise ContractError, naming the setting, unless LLaVA's code computes what the model computes."""
    wanted = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}
    wrong = {name: config.get(name, value) for name, value in wanted.items() if config.get(name, value) != value}
    state, blocks = config.get("vision_feature_layer", -2), config["vision_config"].get("num_hidden_layers")
    if type(state) is not int or (isinstance(blocks, int) and not -blocks - 1 <= state <= blocks):
        wrong["vision_feature_layer"] = state
    if (kind := config["text_config"].get("model_type")) != "llama":
        wrong["text_config.model_type"] = kind
    if wrong:
        listed = ", ".join(f"{name} is {value!r}" for name, value in wrong.items())
        raise ContractError(f"{where}: {listed}: LLaVA 1.5's code has no such model")


def import_hf(source: str, output: Path, *, aspect: str = "", overwrite: bool = False) -> tuple[int, TowerCard]:
    """Write the checkpoint, completely or not at all; the number of its tensors, and its tower's card.

    ``aspect``: image_aspect_ratio, ``pad`` or ``square``; "" for what the model's processor does.
    Raises FileExistsError, FileNotFoundError or ContractError.
    """
    if WORD not in model_name(str(output)).lower():
        raise ValueError(f"LLaVA loads a folder without {WORD!r} in its name as a text model; rename --output {output}")
    model = HfModel.open(source)
    with atomic_directory(output, replace=overwrite) as temporary, ExitStack() as files:
        tensors = named_for_servers(open_tensors(model.directory, files), model.family)
        own = llava_tensors(tensors, model)
        tower = {
            name.removeprefix("vision_tower."): t for name, t in tensors.items() if name.startswith("vision_tower.")
        }
        write_shards(own, temporary, None)
        card = write_tower(model, tower, temporary / BUNDLE)
        location = TowerLocation(directory=temporary / BUNDLE, card=card, origin=card.origin, how="imported")
        config = llava_config(model, aspect)
        write_json(
            temporary / "config.json", {**config, TOWER_KEY: tower_record(location, "llm2clip", card.hidden_size)}
        )
        write_tokenizer(model, temporary)
        ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
        write_json(temporary / "generation_config.json", ids)
    return len(own), card


def named_for_servers(tensors: LazyTensors, family: Family) -> LazyTensors:
    """``tensors`` under the names of `export`, from those or from transformers 5's."""
    out = {}
    for name, tensor in tensors.items():
        old = next((prefix for prefix in RENAMED if name.startswith(prefix)), "")
        new = RENAMED[old] + name.removeprefix(old) if old else name
        if new.startswith("vision_tower."):
            new = (
                f"vision_tower.{family.file_prefix}{new.removeprefix('vision_tower.').removeprefix(family.file_prefix)}"
            )
        out[new] = tensor
    return out


def llava_tensors(tensors: LazyTensors, model: HfModel) -> LazyTensors:
    """The language model's and the projector's tensors under LLaVA's names, without the rows of ``<image>``.

    Raises ContractError for tensors that are missing, unknown or misshapen.
    """
    config = llava_config(model, "")
    rest = {name for name in tensors if not name.startswith("vision_tower.")}
    own = {}
    for name in sorted(
        language.expected(config) + [n.removesuffix("weight") + "bias" for n in language.expected(config)]
    ):
        theirs = language.hf_name(name)
        if theirs in rest:
            tensor = tensors[theirs]
            own[name] = first_rows(tensor, model.tokens) if name in (language.EMBEDDING, language.HEAD) else tensor
            rest.remove(theirs)
    if config.get("tie_word_embeddings"):
        rest.discard(language.hf_name(language.HEAD))
    refuse_rest(rest, model.directory)
    language.language_tensors(own, config, model.tokens, model.directory)  # for its checks
    return own


def first_rows(tensor: LazyTensor, count: int) -> LazyTensor:
    """The first ``count`` rows."""
    shape = (min(count, tensor.shape[0]), *tensor.shape[1:])
    return LazyTensor(shape=shape, read=lambda: tensor.read()[:count], where=tensor.where)


def write_tower(model: HfModel, tensors: LazyTensors, directory: Path) -> TowerCard:
    """A tower directory; its card is the one that `export` saved, if the model has one."""
    directory.mkdir()
    family, card = model.family, model.card
    config = of_tower_directories(model.config["vision_config"], family)
    config = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype", "auto_map")}
    write_json(directory / "config.json", {**config, "architectures": [family.vision_class().__name__]})
    own = (
        read_json_value(model.directory / PREPROCESSOR_FILE) if (model.directory / PREPROCESSOR_FILE).is_file() else {}
    )
    if "image_processor" in (processor := _json(model.directory / "processor_config.json")):
        own = processor["image_processor"]  # transformers 5's own files
    if not own:
        raise FileNotFoundError(f"no {PREPROCESSOR_FILE} in {model.directory}, with the mean and std of images")
    write_json(directory / PREPROCESSOR_FILE, {name: own[name] for name in INHERITED if name in own})
    write_shards(tensors, directory, None, shard_bytes=1 << 62)
    write_json(directory / PREPROCESSOR_FILE, preprocessor_config(directory))
    made = TowerCard(
        family=family.name,
        origin=model.origin,
        has_cls=family.has_cls,
        num_layers=config["num_hidden_layers"],
        **{name: config[name] for name in ("hidden_size", "patch_size", "image_size")},
        weights_sha256=sha256_weights(directory / WEIGHTS_FILE),
        versions=library_versions(),
    )
    if card is not None:  # the text adapter stays with the tower that was exported
        recorded = {name: getattr(card, name) for name in ("origin", "teacher", "training", "metrics", "versions")}
        made = replace(made, **recorded)
    made.write(directory / TowerCard.FILE)
    write_checksums(directory)
    (directory / "README.md").write_text(model_card(made), encoding="utf-8")
    load_tower(directory)  # every tensor used, none missing, the hash of the card
    return made


def llava_config(model: HfModel, aspect: str) -> dict[str, Any]:
    """LLaVA's config.json."""
    config, made = model.config, model.config.get(KEY, {})
    text = language.text_config({**config["text_config"], **_ids(config)}, model.tokens)
    full = config.get("vision_feature_select_strategy", "default") == "full"
    pads = bool(_json(model.directory / PREPROCESSOR_FILE).get("do_pad"))
    longest = _json(model.directory / tokenizer.CONFIG).get("model_max_length")
    return {
        **text,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
        "image_aspect_ratio": aspect or made.get("image_aspect_ratio") or ("pad" if pads else "square"),
        "mm_hidden_size": config["vision_config"]["hidden_size"],
        "mm_patch_merge_type": "flat",
        "mm_projector_type": PROJECTOR_TYPE,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "cls_patch" if full and model.family.has_cls else "patch",
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "mm_vision_tower": "llm2clip",
        "tokenizer_padding_side": "right",
        **({"tokenizer_model_max_length": longest} if isinstance(longest, int) and longest < 1 << 30 else {}),
        "torch_dtype": str(config.get("torch_dtype") or config.get("dtype")).removeprefix("torch."),
        "use_mm_proj": True,
        "pretraining_tp": 1,
        **({CONVERSATION: made["conversation"]} if "conversation" in made else {}),
    }


def _ids(config: dict[str, Any]) -> dict[str, Any]:
    """Special ids; LLaVA pads with <unk> where the model pads with a token that LLaVA doesn't have."""
    text = config["text_config"]
    ids = {
        name: text.get(name) if text.get(name) is not None else config.get(name)
        for name in ("bos_token_id", "eos_token_id")
    }
    pad = config.get("pad_token_id")
    return {**ids, "pad_token_id": pad if isinstance(pad, int) and 0 <= pad < config["image_token_index"] else 0}


def write_tokenizer(model: HfModel, directory: Path) -> None:
    """tokenizer.model and its settings, as LLaVA saves them."""
    source = model.directory
    if not (source / tokenizer.MODEL).is_file():
        raise FileNotFoundError(
            f"no {tokenizer.MODEL} in {source}, which LLaVA's tokenizer is; copy the base model's there"
        )
    tokenizer.read_tokenizer(source)  # raises if it is damaged
    config = _json(source / tokenizer.CONFIG)
    with errors_about(source / tokenizer.FAST, fix="download the model again"):
        added = [{"id": entry["id"], **entry} for entry in _json(source / tokenizer.FAST).get("added_tokens", [])]
    added += [{"id": int(number), **entry} for number, entry in config.get("added_tokens_decoder", {}).items()]
    if later := sorted({e["content"] for e in added if e["id"] > model.tokens and e["content"] != PAD}):
        raise ContractError(f"{source}: tokens {later} come after <image>; LLaVA's vocabulary ends before it")
    kept = {str(entry["id"]): {**entry, "special": True} for entry in added if entry["id"] < model.tokens}
    for entry in kept.values():
        entry.pop("id")
    pads = config.get("pad_token")
    body = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": config.get("legacy", True),
        "add_bos_token": config.get("add_bos_token", True),
        "add_eos_token": False,
        "added_tokens_decoder": kept,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.get("model_max_length", 2048),
        "padding_side": "right",
        **tokenizer.DEFAULTS,
        "pad_token": pads if isinstance(pads, str) and pads != PAD else tokenizer.DEFAULTS["unk_token"],
    }
    write_json(directory / tokenizer.CONFIG, body)
    shutil.copyfile(source / tokenizer.MODEL, directory / tokenizer.MODEL)


def _json(path: Path) -> dict[str, Any]:
    body = read_json_value(path) if path.is_file() else {}
    if not isinstance(body, dict):
        raise ContractError(f"{path} contains a {type(body).__name__}, expected an object")
    return body
