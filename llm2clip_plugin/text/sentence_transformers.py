"""sentence-transformers directories: their pooling and prompts read as encoder settings, and the files of an export."""

import json
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.text.settings import EncoderConfig, apply_settings

MODULES = "modules.json"
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")  # Normalize changes no direction
POOLING_FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}  # their flag -> our pooling
POOLING_NAMES = {"mean": "mean", "lasttoken": "last"}  # of the newer form, "pooling_mode"


def is_sentence_transformers(folder: Path) -> bool:
    """Whether the folder is a sentence-transformers model."""
    return (folder / MODULES).is_file()


def apply_sentence_transformers(config: EncoderConfig, folder: Path) -> EncoderConfig:
    """The configuration with the pooling, prompts, length and attention given in the folder's files.

    Raises ContractError for unsupported modules or pooling, or settings that contradict the files.
    """
    pooling = _read(_pooling_folder(folder) / "config.json")
    lengths = _read(folder / "sentence_bert_config.json").get("max_seq_length")
    prompts = _read(folder / "config_sentence_transformers.json").get("prompts", {})
    settings: dict[str, Any] = {
        "pooling": _pooling(pooling, folder),
        "attention": _attention(_read(folder / "config.json")),
        "prompt": prompts.get("document") or prompts.get("passage") or "",
        "query_prompt": prompts.get("query") or "",
        "include_bos": pooling.get("include_prompt", True) or not any(prompts.values()),
    }
    if isinstance(lengths, int):
        settings["max_tokens"] = lengths
    return apply_settings(config, settings, f"the files of {folder.name} specify")


def _pooling_folder(folder: Path) -> Path:
    """Folder of the pooling module; raises ContractError for unsupported modules."""
    modules = _read(folder / MODULES)
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    if unknown := [kind for kind in kinds if kind not in KNOWN_MODULES]:
        raise ContractError(f"{folder} has unsupported modules {unknown}; supported: {', '.join(KNOWN_MODULES)}")
    if "Pooling" not in kinds:
        raise ContractError(f"{folder} has no pooling module; its modules are {kinds}")
    return folder / modules[kinds.index("Pooling")]["path"]


def _pooling(settings: dict[str, Any], folder: Path) -> str:
    """mean or last, from either form of the pooling module's configuration."""
    modes = {name for name, on in settings.items() if name.startswith("pooling_mode_") and on}
    kinds = [POOLING_FLAGS.get(name) for name in modes]
    if settings.get("pooling_mode") in POOLING_NAMES and modes <= set(POOLING_FLAGS):
        kinds = [POOLING_NAMES[settings["pooling_mode"]]]
    if len(kinds) != 1 or kinds[0] is None:
        raise ContractError(f"{folder} has unsupported pooling {settings}; supported: mean, last token")
    return kinds[0]


def _attention(settings: dict[str, Any]) -> str:
    """Decoders are causal unless their configuration has is_causal false; encoders never are."""
    causal = (
        any("ForCausalLM" in name for name in settings.get("architectures") or []) or "num_key_value_heads" in settings
    )
    return "causal" if settings.get("is_causal", causal) else "bidirectional"


def _read(path: Path) -> Any:
    """A JSON file; {} if it is missing."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ContractError(f"{path} is not valid JSON ({error})") from error


def refuse_unsupported(config: EncoderConfig, *, has_bos: bool, post: bool) -> None:
    """Raise ValueError for settings that sentence-transformers does not support.

    It pools the last layer, over all tokens or all but prompt and BOS, without a template. has_bos: the tokenizer
    puts a BOS first; post: embeddings are centered or whitened.
    """
    reasons = ["centering or whitening"] if post else []
    if config.chat_template:
        reasons.append("a chat template")
    if config.layer != -1:
        reasons.append(f"layer {config.layer}")
    prompts = [prompt for prompt in (config.prompt, config.query_prompt) if prompt]
    if config.pooling == "mean" and has_bos and (config.include_bos is bool(prompts)):
        reasons.append("pooling BOS but not the prompt" if prompts else "leaving BOS out without a prompt")
    if config.pooling == "mean" and has_bos and len(prompts) == 1:
        reasons.append("a prompt for queries or captions only (BOS would be pooled for the others)")
    if any(prompt.endswith(" ") for prompt in prompts):
        reasons.append("a prompt that ends in a space (it counts the caption's first token as the prompt's)")
    if reasons:
        raise ValueError(f"sentence-transformers does not support {' and '.join(reasons)}; use --format merged")


def write_sentence_transformers(config: EncoderConfig, width: int, folder: Path) -> None:
    """Add the files of sentence-transformers to a folder of merged weights; ``width``: of an embedding."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    pooling = {
        "word_embedding_dimension": width,
        "pooling_mode_mean_tokens": config.pooling == "mean",
        "pooling_mode_lasttoken": config.pooling == "last",
        "pooling_mode_cls_token": False,
        "pooling_mode_max_tokens": False,
        "include_prompt": False,
    }
    files = {
        MODULES: modules,
        "sentence_bert_config.json": {"max_seq_length": config.max_tokens, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"query": config.query_prompt, "document": config.prompt},
            "default_prompt_name": "document" if config.prompt else None,
            "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": pooling,
    }
    for name, body in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
