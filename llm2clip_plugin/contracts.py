"""The records that stages exchange: JSON files with a kind and a format version.

Standard library only: this module is imported by the training environment, by LLaVA's environment
and by ``llm2clip --help``.
"""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from llm2clip_plugin.atomic import write_text
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.hashes import canonical_json, sha256_text
from llm2clip_plugin.json_files import from_plain, read_json_value, typed

Record = TypeVar("Record", bound="VersionedRecord")


@dataclass(frozen=True, kw_only=True)
class VersionedRecord:
    """A dataclass stored as JSON with its kind and format version; reading rejects any other."""

    KIND: ClassVar[str] = ""
    VERSION: ClassVar[int] = 1

    def to_json(self) -> str:
        body = {
            "kind": self.KIND,
            "format_version": self.VERSION,
            **dataclasses.asdict(self),
        }
        return json.dumps(body, indent=2, ensure_ascii=False) + "\n"

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the record atomically to ``path`` and return the path."""
        return write_text(path, self.to_json())

    @classmethod
    def read(cls: type[Record], path: str | os.PathLike[str]) -> Record:
        """Read a record. Raises FileNotFoundError, or ContractError naming file and field."""
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no {cls.KIND} at {path}")
        body = read_json_value(path)
        kind = body.pop("kind", None) if isinstance(body, dict) else type(body).__name__
        if kind != cls.KIND:
            raise ContractError(f"{path} contains a {kind!r}, expected a {cls.KIND!r}")
        if (version := body.pop("format_version", None)) != cls.VERSION:
            problem = f"{path} has format version {version}, but this release reads {cls.VERSION}"
            raise ContractError(
                f"{problem}; create it again with this release, or install the one that wrote it"
            )
        record = from_plain(cls, body, where=str(path))
        record.check_values(where=str(path))
        return record

    def check_values(self, *, where: str) -> None:
        """Raise ContractError for a value that no reader can use; the types of all fields are right
        already."""


@dataclass(frozen=True, kw_only=True)
class TowerCard(VersionedRecord):
    """``llm2clip.json`` of a tower directory: what the tower is, how it was made, the hashes of its
    weights."""

    KIND: ClassVar[str] = "llm2clip-tower"

    family: str  # name of a vision.families member: clip, siglip, dinov2, eva02 ...
    origin: str  # path or Hub id of the weights that training or import started from
    hidden_size: int  # width of a patch state
    num_layers: int  # transformer blocks
    patch_size: int  # pixels
    image_size: int  # pixels; the position table has exactly this grid
    has_cls: bool
    weights_sha256: str  # sha256_weights(model.safetensors)
    projection_dim: int = 0  # 0: no projection, the directory contains a tower alone
    adapter_sha256: str = ""  # sha256_weights(text_adapter.safetensors); "" without one
    # DualConfig: pooling, adapter kind, LLM width ...
    dual: dict[str, Any] = field(default_factory=dict)
    # TeacherIdentity as a dict; {} if never trained
    teacher: dict[str, Any] = field(default_factory=dict)
    # steps, samples, data, config hash, resized_from
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    # of the libraries that wrote it
    versions: dict[str, str] = field(default_factory=dict)

    FILE: ClassVar[str] = "llm2clip.json"

    @property
    def num_patches(self) -> int:
        """Patches of one image, without the class token."""
        return (self.image_size // self.patch_size) ** 2


# pooling of a CLIP's own text tower: the features that it compares with its images'
PROJECTED = "projected"


@dataclass(frozen=True, kw_only=True)
class TeacherIdentity:
    """Everything that determines the embedding of a caption; caches and towers record its
    fingerprint."""

    llm: str  # path or Hub id, for display; not part of the fingerprint
    revision: str  # Hub commit, or "" for a local folder; not part of the fingerprint
    weights_sha256: str  # over the LLM's weight files
    adapter_sha256: str  # over the PEFT adapter's weights; "" without one
    attention: str  # bidirectional | causal | own (a CLIP's text tower)
    pooling: str  # mean | last | projected
    layer: int  # hidden state that is pooled; -1 is the last
    prompt: str  # precedes every caption; not pooled
    chat_template: str  # "" for none
    max_tokens: int
    width: int  # of an embedding
    include_bos: bool = True  # pool the beginning-of-text token too
    tokenizer: str = ""  # hash of the tokens of a fixed text
    quantization: str = ""  # "" | nf4
    post: str = ""  # sha256 of the centering or whitening parameters; "" for none
    # path or Hub id of the adapter, to find it again; not part of the fingerprint
    adapter: str = ""
    # path of the post-processing, unless it is in the adapter's or LLM's folder, to find it again;
    # not part of the fingerprint
    post_file: str = ""
    # hashes of the LLM's settings and of its tokenizer; "" in a record from before they were part
    # of the fingerprint
    config_sha256: str = ""
    tokenizer_sha256: str = ""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that changes an embedding, so not over where the weights are."""
        body = dataclasses.asdict(self)
        for name in ("llm", "revision", "adapter", "post_file"):  # places
            del body[name]
        for name in ("config_sha256", "tokenizer_sha256"):
            if not body[name]:
                del body[name]
        return sha256_text(canonical_json(body))

    @property
    def is_earlier(self) -> bool:
        """Whether this is a record from before config.json and tokenizer were part of it."""
        return not self.config_sha256

    def earlier(self) -> "TeacherIdentity":
        """The teacher as it was recorded before config.json and tokenizer were part of it."""
        return dataclasses.replace(self, config_sha256="", tokenizer_sha256="")

    def agrees_with(self, other: "TeacherIdentity") -> bool:
        """Whether both are the same teacher, as far as both records say."""
        if self.is_earlier or other.is_earlier:
            return self.earlier().fingerprint == other.earlier().fingerprint
        return self.fingerprint == other.fingerprint


# in the folder of an adapter, an LLM or a tower: centering and removed components of embeddings
POST_FILE = "llm2clip_post.safetensors"


@dataclass(frozen=True, kw_only=True)
class EncoderCard(VersionedRecord):
    """``llm2clip_encoder.json`` next to an adapter or merged LLM: how to embed captions with it."""

    KIND: ClassVar[str] = "llm2clip-encoder"
    FILE: ClassVar[str] = "llm2clip_encoder.json"

    base: str  # path or Hub id of the LLM that was fine-tuned, for display
    base_sha256: str  # over its weight files; "" for a merged LLM
    attention: str  # bidirectional | causal
    pooling: str  # mean | last
    layer: int  # hidden state that is pooled; -1 is the last
    prompt: str  # precedes every caption that is embedded for the cache; not pooled
    query_prompt: (
        str  # precedes queries in training and in caption retrieval; not pooled
    )
    chat_template: str  # literal text around "{caption}"; "" for none
    include_bos: bool
    max_tokens: int
    # sha256_weights of the centering or whitening parameters; "" for none
    post_sha256: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CacheManifest(VersionedRecord):
    """``manifest.json`` of an embedding cache: its teacher, shards and storage."""

    KIND: ClassVar[str] = "llm2clip-cache"
    FILE: ClassVar[str] = "manifest.json"

    teacher: dict[str, Any]  # TeacherIdentity as a dict
    fingerprint: str  # TeacherIdentity.fingerprint
    dtype: str  # float16 | int8
    width: int
    # shard name -> {"file", "samples", "captions", "truncated"}
    shards: dict[str, dict[str, Any]]
    complete: bool = True
    # fingerprint in shards from before config.json was part of it, which were proven by embedding
    # some captions again
    earlier_fingerprint: str = ""

    def check_values(self, *, where: str) -> None:
        """Raise ContractError for a value of a shard's entry of another type; the reader checks
        which are missing."""
        kinds = {
            "file": str,
            "samples": int,
            "captions": int,
            "truncated": int,
            "rows_sha256": str,
            "sha256": str,
        }
        for name, entry in self.shards.items():
            for key, kind in kinds.items():
                if key in entry:
                    typed(kind, entry[key], f"{where}: shards.{name}.{key}")

    @property
    def lasting_fingerprint(self) -> str:
        """The fingerprint that a cache keeps when it is proven and renewed."""
        return self.earlier_fingerprint or self.fingerprint

    @property
    def captions(self) -> int:
        """Captions over all shards."""
        return sum(shard["captions"] for shard in self.shards.values())


@dataclass(frozen=True, kw_only=True)
class EmbedRecord(VersionedRecord):
    """``embed.json`` of an embedding cache: what the last ``llm2clip embed`` was to embed, for
    ``llm2clip status``."""

    KIND: ClassVar[str] = "llm2clip-embed"
    FILE: ClassVar[str] = "embed.json"

    data: str  # path or URL of the data
    shards: list[str]  # names of its shards
    command: dict[str, Any] = field(default_factory=dict)  # run_folder.started_by


@dataclass(frozen=True, kw_only=True)
class PipelineRecord(VersionedRecord):
    """``pipeline.json`` of the folder of ``llm2clip run``: its stages, and what each that was
    started read and made."""

    KIND: ClassVar[str] = "llm2clip-pipeline"
    FILE: ClassVar[str] = "pipeline.json"

    order: list[str] = field(default_factory=list)  # names of all stages
    # of each stage that was started: its command, digests of what it read and made, and whether it
    # is complete
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    command: dict[str, Any] = field(default_factory=dict)  # run_folder.started_by


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
    # scores before step 1; {} if none were measured
    before: dict[str, float] = field(default_factory=dict)
    total_steps: int = 0  # of the whole run; 0: not recorded, or heads alone
    # image-caption pairs of one pass over the data; 0: not recorded
    epoch_samples: int = 0
    # how it was started last: run_folder.started_by
    command: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    wandb: str = ""  # id of the run in Weights & Biases


@dataclass(frozen=True, kw_only=True)
class ScoreFile(VersionedRecord):
    """Scores of a model on a benchmark: metrics, and every item for paired statistics."""

    KIND: ClassVar[str] = "llm2clip-scores"

    benchmark: str
    metrics: dict[str, float]
    # {"id", "score", "cluster", ...} per question; cluster = its image
    items: list[dict[str, Any]]
    # missing, duplicate, unparsable ...
    counts: dict[str, int] = field(default_factory=dict)
    model: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


VALUE_BYTES = {"float16": 2, "int8": 1}  # of one number of a stored row
CACHE_DTYPES = tuple(VALUE_BYTES)


def shard_file(shard: str) -> str:
    """File name of a shard, relative to the cache; a hash for a shard name that would lead out of
    the folder."""
    parts = Path(shard).parts
    if not parts or Path(shard).is_absolute() or ".." in parts:
        return f"shard-{hashlib.sha256(shard.encode()).hexdigest()[:16]}.safetensors"
    return f"{shard}.safetensors"
