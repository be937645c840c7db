"""Records of what ran: embedding caches, training runs, scores."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from llm2clip_plugin.contracts.record import VersionedRecord
from llm2clip_plugin.outside.values import ContractError, type_problem


@dataclass(frozen=True, kw_only=True)
class CacheManifest(VersionedRecord):
    """``manifest.json`` of an embedding cache: its teacher, shards and storage."""

    KIND: ClassVar[str] = "llm2clip-cache"
    FILE: ClassVar[str] = "manifest.json"

    teacher: dict[str, Any]  # TeacherIdentity as a dict
    fingerprint: str  # TeacherIdentity.fingerprint
    dtype: str  # float16 | int8
    width: int
    shards: dict[str, dict[str, Any]]  # shard name -> {"file", "samples", "captions", "truncated"}
    complete: bool = True

    def check_values(self, *, where: str) -> None:
        """Raise ContractError for a value of a shard's entry of another type; the reader checks which are missing."""
        kinds = {"file": str, "samples": int, "captions": int, "truncated": int, "rows_sha256": str, "sha256": str}
        for name, entry in self.shards.items():
            for key, kind in kinds.items():
                if key in entry and (problem := type_problem(entry[key], kind)):
                    raise ContractError(f"{where}: shards.{name}.{key}{problem}")

    @property
    def captions(self) -> int:
        """Captions over all shards."""
        return sum(shard["captions"] for shard in self.shards.values())


@dataclass(frozen=True, kw_only=True)
class EmbedRecord(VersionedRecord):
    """``embed.json`` of an embedding cache: what the last ``llm2clip embed`` was to embed, for ``llm2clip status``."""

    KIND: ClassVar[str] = "llm2clip-embed"
    FILE: ClassVar[str] = "embed.json"

    data: str  # path or URL of the data
    shards: list[str]  # names of its shards
    command: dict[str, Any] = field(default_factory=dict)  # run_files.started_by


@dataclass(frozen=True, kw_only=True)
class RunRecord(VersionedRecord):
    """``run.json`` of a training run: its configuration and progress."""

    KIND: ClassVar[str] = "llm2clip-run"
    FILE: ClassVar[str] = "run.json"

    config: dict[str, Any]
    config_hash: str
    teacher: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    samples: int = 0  # image-caption pairs consumed by all ranks together
    finished: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)  # scores before step 1; {} if none were measured
    total_steps: int = 0  # of the whole run; 0: not recorded, or heads alone
    epoch_samples: int = 0  # image-caption pairs of one pass over the data; 0: not recorded
    command: dict[str, Any] = field(default_factory=dict)  # how it was started last: run_files.started_by
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ScoreFile(VersionedRecord):
    """Scores of one model on one benchmark: headline metrics, and every item for paired statistics."""

    KIND: ClassVar[str] = "llm2clip-scores"

    benchmark: str
    metrics: dict[str, float]
    items: list[dict[str, Any]]  # {"id", "score", "cluster", ...} per question; cluster = its image
    counts: dict[str, int] = field(default_factory=dict)  # missing, duplicate, unparsable ...
    model: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
