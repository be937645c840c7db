"""Where an LLM's files are, and what their weights hash to."""

from __future__ import annotations

import json
from pathlib import Path

from llm2clip_plugin.contracts import ContractError, canonical_json, sha256_file, sha256_text, sha256_weights

WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What of an adapter's configuration changes its output beside the weights.
ADAPTER_SETTINGS = (
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
)


def local_folder(llm: str, revision: str = "") -> Path:
    """The folder of an LLM: ``llm`` itself, or the Hub's snapshot of it, downloaded if it isn't here yet.

    Raises FileNotFoundError saying what was looked for, and where.
    """
    if not llm:
        raise ValueError("no LLM is named; give --llm PATH_OR_HUB_ID")
    if Path(llm).is_dir():
        if not (Path(llm) / "config.json").is_file():
            raise FileNotFoundError(f"{llm} is a folder without config.json; expected a Hugging Face model folder")
        return Path(llm)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(llm, revision=revision or None, allow_patterns=WANTED))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(llm, revision=revision or None, allow_patterns=["*.bin"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"LLM {llm!r} is neither a folder here nor to be had from the Hub: {reason}") from error
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, in order of name; raises FileNotFoundError without any."""
    for pattern in WEIGHT_PATTERNS:
        if found := sorted(folder.glob(pattern)):
            return found
    raise FileNotFoundError(f"{folder} has no weights; looked for {', '.join(WEIGHT_PATTERNS)}")


def weights_sha256(folder: Path) -> str:
    """SHA-256 over a model folder's weights."""
    hashes = [
        sha256_weights(path) if path.suffix == ".safetensors" else sha256_file(path) for path in weight_files(folder)
    ]
    return hashes[0] if len(hashes) == 1 else sha256_text(canonical_json(hashes))


def adapter_sha256(folder: Path) -> str:
    """SHA-256 over a PEFT adapter: its tensors, and the settings that scale or place them.

    Raises FileNotFoundError for a folder that holds no adapter.
    """
    config, weights = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    for path in (config, weights):
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no PEFT adapter: {path.name} is missing")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ContractError(f"{config} is not valid JSON ({error})") from error
    chosen = {name: settings.get(name) for name in ADAPTER_SETTINGS}
    if isinstance(chosen["target_modules"], list):
        chosen["target_modules"] = sorted(chosen["target_modules"])  # PEFT writes a set, in any order
    return sha256_text(canonical_json([sha256_weights(weights), chosen]))
