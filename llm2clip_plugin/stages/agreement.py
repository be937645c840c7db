"""What the ranks of a training run must have in common before its first step."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import llm2clip_plugin
from llm2clip_plugin.stages.settings import flat
from llm2clip_plugin.vision.export import library_versions

# Settings that may differ between hosts: where things are (what is there is compared instead), and how many processes
# load, which follows a host's cores.
PLACES = (
    "output_dir",
    "resume",
    "deepspeed",
    "plan",
    "data.path",
    "data.cache",
    "data.validation",
    "data.validation_cache",
    "data.clip_cache",
    "data.read.images",
    "data.read.cache_folder",
    "data.read.cache_gb",
    "pairs.data",
    "pairs.read.images",
    "pairs.read.cache_folder",
    "pairs.read.cache_gb",
    "tower.path",
    "encoder.llm",
    "encoder.adapter",
    "start_adapters",
    "train.dataloader_num_workers",
)
ADVICE = {  # first word of a fact -> what to do
    "output_dir": "output_dir must be a folder that all hosts share: set --output to one on NFS or Lustre",
    "checkpoint": "every host must see the same checkpoints: set --output (or --resume) to a shared folder",
    "data": "every host must read the same data and caches: copy them again, or use a shared folder",
    "setting": "start every rank with the same command",
    "DeepSpeed": "every host must read the same DeepSpeed configuration",
    "version": "install the same environment on every host",
}


def run_facts(
    settings: Mapping[str, Any], deepspeed: Mapping[str, Any], data: Mapping[str, str], *, total_steps: int
) -> dict[str, str]:
    """This rank's settings, DeepSpeed configuration, digests of its data, and versions."""
    own = {f"data {name}": digest for name, digest in data.items()}
    own["setting total steps"] = str(total_steps)
    for name, value in flat(dict(settings)):
        if not any(name == place or name.startswith(f"{place}.") for place in PLACES):
            own[f"setting {name}"] = json.dumps(value)
    own |= {f"DeepSpeed {name}": json.dumps(value) for name, value in flat(dict(deepspeed))}
    return own | {f"version of {name}": version for name, version in versions().items()}


def versions() -> dict[str, str]:
    """Versions of the libraries that train, and a digest of this package's files: its version may lag behind them."""
    own = {"deepspeed": importlib.metadata.version("deepspeed"), **library_versions()}
    own["llm2clip-plugin"] += f" ({_code_digest()})"
    return own


@lru_cache
def _code_digest() -> str:
    digest = hashlib.sha256()
    folder = Path(llm2clip_plugin.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
