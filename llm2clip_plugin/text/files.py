"""The files of an LLM or adapter: found or downloaded, and hashed."""

from collections.abc import Sequence
from pathlib import Path

from llm2clip_plugin.contracts import ContractError, canonical_json, sha256_file, sha256_text, sha256_weights
from llm2clip_plugin.outside.timeouts import can_only_be_a_path, hub_snapshot
from llm2clip_plugin.outside.values import read_json_value

SNAPSHOT_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Settings of an adapter that change its output; the rest of its configuration is left out of the hash.
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
    """The folder of an LLM: ``llm`` itself, or its snapshot from the Hub, downloaded unless it is cached.

    Raises ValueError for an empty ``llm``, FileNotFoundError if neither a folder nor the Hub has it.
    """
    if not llm:
        raise ValueError("no LLM given; set --llm PATH_OR_HUB_ID")
    if Path(llm).is_dir():
        if not (Path(llm) / "config.json").is_file():
            raise FileNotFoundError(f"{llm} has no config.json; expected a Hugging Face model folder")
        return Path(llm)
    folder = _snapshot("LLM", llm, revision, SNAPSHOT_PATTERNS)
    return folder if any(folder.glob("*.safetensors")) else _snapshot("LLM", llm, revision, ["*.bin"])


def adapter_folder(adapter: str) -> Path:
    """The folder of a PEFT adapter: ``adapter`` itself, or its snapshot from the Hub, downloaded unless it is cached.

    Raises FileNotFoundError if neither a folder nor the Hub has it.
    """
    if Path(adapter).is_dir() or can_only_be_a_path(adapter) or "/" not in adapter:
        return Path(adapter)
    return _snapshot("adapter", adapter, "", SNAPSHOT_PATTERNS)


def _snapshot(kind: str, name: str, revision: str, patterns: list[str]) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return hub_snapshot(name, revision=revision or None, patterns=patterns)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{kind} {name!r} is not a local folder and cannot be loaded from the Hub: {reason}"
        ) from error


def weights_sha256(folder: Path) -> str:
    """SHA-256 over a model folder's weights; raises FileNotFoundError if there are none."""
    paths = next(filter(None, (sorted(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS)), None)
    if paths is None:
        raise FileNotFoundError(f"{folder} has no weights (no {' or '.join(WEIGHT_PATTERNS)})")
    return files_sha256(paths)


def files_sha256(paths: Sequence[Path]) -> str:
    """SHA-256 over files of weights."""
    hashes = [sha256_weights(path) if path.suffix == ".safetensors" else sha256_file(path) for path in paths]
    return hashes[0] if len(hashes) == 1 else sha256_text(canonical_json(hashes))


def adapter_sha256(folder: Path) -> str:
    """SHA-256 over a PEFT adapter: its tensors and ``ADAPTER_SETTINGS``.

    Raises FileNotFoundError for a folder without an adapter.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no adapter at {folder}; expected the folder of a PEFT adapter, or a Hub id")
    config, weights = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    for path in (config, weights):
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not a PEFT adapter: {path.name} is missing")
    settings = read_json_value(config)
    if not isinstance(settings, dict):
        raise ContractError(f"{config} contains a {type(settings).__name__}, expected the settings of a PEFT adapter")
    relevant = {name: settings.get(name) for name in ADAPTER_SETTINGS}
    if isinstance(relevant["target_modules"], list):
        relevant["target_modules"] = sorted(map(str, relevant["target_modules"]))  # PEFT writes a set in random order
    return sha256_text(canonical_json([sha256_weights(weights), relevant]))
