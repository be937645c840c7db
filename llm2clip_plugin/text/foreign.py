"""sentence-transformers directories as teachers: how they pool, read from their own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.text.settings import EncoderConfig, apply_settings

MODULES = "modules.json"
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")  # normalising changes no direction
POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}
NAMES = {"mean": "mean", "lasttoken": "last"}


def is_sentence_transformers(folder: Path) -> bool:
    """Whether the folder is a sentence-transformers model."""
    return (folder / MODULES).is_file()


def apply_sentence_transformers(config: EncoderConfig, folder: Path) -> EncoderConfig:
    """The configuration with the pooling, prompts, length and attention that the folder's own files say.

    Raises ContractError for modules or pooling that can't be reproduced here, or settings that contradict them.
    """
    pooling_folder = _pooling_folder(folder)
    pooling = _read(pooling_folder / "config.json")
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
    return apply_settings(config, settings, f"{folder.name}'s own files say")


def _pooling_folder(folder: Path) -> Path:
    """Where the pooling module is, every module being one that we know."""
    modules = _read(folder / MODULES)
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    if unknown := [kind for kind in kinds if kind not in KNOWN_MODULES]:
        raise ContractError(f"{folder} has the modules {kinds}; {unknown} can't be reproduced here")
    if "Pooling" not in kinds:
        raise ContractError(f"{folder} has no pooling module; its modules are {kinds}")
    return folder / modules[kinds.index("Pooling")]["path"]


def _pooling(settings: dict[str, Any], folder: Path) -> str:
    """mean or last, from either form of the pooling module's configuration."""
    found = [ours for name, ours in POOLING.items() if settings.get(name)]
    others = [name for name, on in settings.items() if name.startswith("pooling_mode_") and on and name not in POOLING]
    if settings.get("pooling_mode") in NAMES:
        found = [NAMES[settings["pooling_mode"]]]
    if len(found) != 1 or others:
        raise ContractError(f"{folder} pools by {settings}; mean and last token can be reproduced here")
    return found[0]


def _attention(settings: dict[str, Any]) -> str:
    """Decoders are causal unless their configuration says otherwise; encoders never are."""
    causal = (
        any("ForCausalLM" in name for name in settings.get("architectures") or []) or "num_key_value_heads" in settings
    )
    return "causal" if settings.get("is_causal", causal) else "bidirectional"


def _read(path: Path) -> Any:
    """A JSON file; {} where it is not there."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ContractError(f"{path} is not valid JSON ({error})") from error
