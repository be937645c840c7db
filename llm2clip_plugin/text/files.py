"""The files of an LLM or adapter: found or downloaded, and hashed."""

from pathlib import Path

from llm2clip_plugin.contracts import ContractError, canonical_json, sha256_file, sha256_text, sha256_weights
from llm2clip_plugin.outside.timeouts import can_only_be_a_path, hub_snapshot
from llm2clip_plugin.outside.values import read_json_value, typed

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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = hub_snapshot(llm, revision=revision or None, patterns=SNAPSHOT_PATTERNS)
        if not any(folder.glob("*.safetensors")):
            hub_snapshot(llm, revision=revision or None, patterns=["*.bin"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"LLM {llm!r} is not a local folder and cannot be loaded from the Hub: {reason}"
        ) from error
    return folder


def adapter_folder(adapter: str) -> Path:
    """The folder of a PEFT adapter: ``adapter`` itself, or its snapshot from the Hub, downloaded unless it is cached.

    Raises FileNotFoundError if neither a folder nor the Hub has it.
    """
    if Path(adapter).is_dir() or can_only_be_a_path(adapter) or "/" not in adapter:
        return Path(adapter)
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return hub_snapshot(adapter, patterns=SNAPSHOT_PATTERNS)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"adapter {adapter!r} is not a local folder and cannot be loaded from the Hub: {reason}"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, sorted by name; raises FileNotFoundError if there are none."""
    for pattern in WEIGHT_PATTERNS:
        if paths := sorted(folder.glob(pattern)):
            return paths
    raise FileNotFoundError(f"{folder} has no weights (no {' or '.join(WEIGHT_PATTERNS)})")


def weights_sha256(folder: Path) -> str:
    """SHA-256 over a model folder's weights."""
    hashes = [
        sha256_weights(path) if path.suffix == ".safetensors" else sha256_file(path) for path in weight_files(folder)
    ]
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
        names = typed(list[str], relevant["target_modules"], f"{config}: target_modules")
        relevant["target_modules"] = sorted(names)  # PEFT writes a set, whose order is random
    return sha256_text(canonical_json([sha256_weights(weights), relevant]))
