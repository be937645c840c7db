"""What a score file of ``llm2clip bench-mllm`` records about the model and the run that its answers come from."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import sha256_file

LIBRARIES = ("llm2clip-plugin", "llava-torch", "llava", "torch", "transformers", "numpy", "lmms-eval")


def run_provenance(model_path: str, question_file: Path, command: list[str]) -> dict[str, Any]:
    """What the answers were generated from: checkpoint, tower, LLM, questions, versions, command.

    ``model_path`` is "" for a served model, which the answers' settings name (``score.provenance``).
    """
    record: dict[str, Any] = {
        "question_file": str(question_file),
        "question_file_sha256": sha256_file(question_file),
        "command": command,
        "versions": versions(),
    }
    config = Path(model_path) / "config.json"
    if model_path:
        record["checkpoint"] = model_path
    if model_path and config.is_file():
        body = json.loads(config.read_text(encoding="utf-8"))
        record |= {
            "checkpoint_config_sha256": sha256_file(config),
            "llm": body.get("_name_or_path", ""),
            "tower": body.get("mm_vision_tower", ""),
            "tower_sha256": (body.get("llm2clip_tower") or {}).get("weights_sha256", ""),
        }
    return record


def versions() -> dict[str, str]:
    """Installed versions of the libraries that answers depend on."""
    installed = {}
    for name in LIBRARIES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed
