"""What the quickstart's adapters, caches and towers were made from, by their own records; anything else is refused.

A name says what it must be: the tower ``tuned-seed3`` was trained on the training shards against the cache
``tuned-seed3``, which was embedded with the adapter ``llm/seed3``, which was trained on training captions.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import RunRecord, TeacherIdentity
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.text.adapter import adapter_sha256

RANDOM = "random embeddings"  # the name of the control's teacher
AGAIN = "delete it and rerun scripts/quickstart.sh"


def check_caches(data: Path, caches: Mapping[str, EmbeddingCache]) -> None:
    """Raise ContractError for a cache embedded without the adapter of its name, and an adapter of other captions."""
    for name, cache in caches.items():
        used, expected, adapter = cache.manifest.teacher["adapter_sha256"], "", "no adapter"
        if (cache.manifest.teacher["llm"] == RANDOM) != (name == "random"):
            raise ContractError(f"{cache.directory} holds embeddings of {cache.manifest.teacher['llm']}; {AGAIN}")
        if name.startswith("tuned-"):
            run = data / "llm" / name.removeprefix("tuned-")
            adapter, expected = str(run / "adapter"), adapter_sha256(run / "adapter")
            for path in map(Path, RunRecord.read(run / RunRecord.FILE).config["pairs"]["data"]):
                if not path.name.startswith("train-"):
                    raise ContractError(f"{run} was fine-tuned on {path}, which is not a training shard; {AGAIN}")
        if used != expected:
            raise ContractError(
                f"{cache.directory} was embedded with adapter {used[:12] or 'none'}, expected {adapter} "
                f"({expected[:12] or 'none'}); {AGAIN}"
            )
        read = (cache.manifest.teacher["pooling"], bool(cache.manifest.teacher["post"]))
        if name != "random" and read != ("mean" if name == "plain" else "last", name == "raw"):
            raise ContractError(f"{cache.directory} pools {read[0]}, {'with' if read[1] else 'no'} post file; {AGAIN}")


def cache_of(tower: Path, teacher: Mapping[str, Any], caches: Mapping[str, EmbeddingCache]) -> EmbeddingCache:
    """The cache that a tower of this name is trained against; raises ContractError if its teacher is another."""
    side, _, seed = tower.name.partition("-")
    others = {"shuffled": ("tuned-seed0", "raw"), "tuned": (f"tuned-{seed}",)}
    names = others.get(side, (side,))
    fingerprint = TeacherIdentity(**teacher).fingerprint
    for name in names:
        if name in caches and caches[name].fingerprint == fingerprint:
            return caches[name]
    known = {name: cache.fingerprint for name, cache in caches.items()}
    raise ContractError(
        f"{tower} was trained with teacher {fingerprint}, expected that of {' or '.join(names)}; "
        f"the caches belong to {known}"
    )


def check_run(tower: Path) -> dict[str, Any]:
    """The shards, caches and seed of a tower's training, from ``runs/NAME/run.json``.

    Raises ContractError if it read other shards than those of its name, or validated on the test's; FileNotFoundError
    without a record.
    """
    side, _, seed = tower.name.partition("-")
    run = tower.parents[1] / "runs" / tower.name / RunRecord.FILE
    config = RunRecord.read(run).config
    folder = "shuffled" if side == "shuffled" else "all"
    for path in map(Path, config["data"]["path"]):
        if path.parent.name != folder or not path.name.startswith("train-"):
            raise ContractError(f"{tower} was trained on {path}, expected {folder}/train-*.tar; {AGAIN}")
    validation = Path(config["data"]["validation"])
    if validation.name and not validation.name.startswith("validation-"):
        raise ContractError(f"{tower} was validated on {validation}, expected a validation shard; {AGAIN}")
    if config["train"]["seed"] != int(seed.removeprefix("seed")):
        raise ContractError(f"{tower} was trained with seed {config['train']['seed']}; {AGAIN}")
    return {name: config["data"][name] for name in ("path", "cache", "validation")}
