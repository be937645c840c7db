"""The files that stages exchange: versioned JSON records, hashes, and atomic writes.

Standard library only: this module is imported by the training environment, by LLaVA's environment
and by ``llm2clip --help``.
"""

import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, TypeVar

import llm2clip_plugin.files as files
from llm2clip_plugin.files import ContractError, from_plain, read_header, read_json_value, typed

RATE_LINES = 20  # last lines of steps in metrics.jsonl that rates are the means of
FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(OSError):
    """No space is left, or a quota is used up, where a file is written."""

    def __init__(self, target: str | os.PathLike[str], number: int = errno.ENOSPC) -> None:
        super().__init__(number, os.strerror(number), os.fspath(target))
        path = Path(os.path.abspath(target))
        folder = next(parent for parent in (path, *path.parents) if parent.exists())
        self.reason = f"{self.strerror} ({size_text(shutil.disk_usage(folder).free)} free)"

    def __str__(self) -> str:
        return (
            f"cannot write {self.filename}: {self.reason}; free space there, and rerun the same "
            "command"
        )

    def __reduce__(self) -> tuple[type, tuple[str, int | None]]:  # processes send it to each other
        return type(self), (self.filename, self.errno)


@contextmanager
def naming_full_disk(target: str | os.PathLike[str]) -> Iterator[None]:
    """Raise DiskFullError for ``target`` if the block fails because its disk is full: safetensors
    has its own error."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in FULL or any(os.strerror(full) in str(error) for full in FULL):
            raise DiskFullError(target, number if number in FULL else errno.ENOSPC) from error
        raise


def size_text(number: float) -> str:
    """Bytes for people: ``1.50 GB``, ``0.21 MB``."""
    return f"{number / 1e9:.2f} GB" if number >= 1e7 else f"{number / 1e6:.2f} MB"


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling of ``path``; if the block ends without an error, flush it to disk
    and rename it. Raises DiskFullError, which names ``path``, whatever a library raises on a full
    disk."""
    target = Path(path)
    temporary = _sibling(target)
    with naming_full_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            os.chmod(temporary, mode)  # safetensors makes its files readable by their owner only
            fsync(temporary)
            os.replace(temporary, target)
            fsync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text in UTF-8 as ``atomic_file`` does, and return the path."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


@contextmanager
def atomic_directory(
    path: str | os.PathLike[str],
    *,
    replace: bool = False,
    fix: str = "choose another path or pass --overwrite",
) -> Iterator[Path]:
    """As ``atomic_file``, of a directory, which replaces an old one when it is complete. Raises
    FileExistsError before any work if ``path`` is a file, or if it is not empty and ``replace`` is
    false (with ``fix``). A folder that may be the user's is for ``folders.output_folder``."""
    target = Path(os.path.realpath(path))  # what a link leads to is replaced, not the link
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{path} is a file, expected a folder; choose another path")
    if not replace and target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{path} exists and is not empty; {fix}")
    temporary = _sibling(target)
    old = temporary.with_suffix(".old")
    with naming_full_disk(target):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for inside in (*temporary.rglob("*"), temporary):
                if not inside.is_symlink():
                    fsync(inside)
            if target.exists():
                os.replace(target, old)  # a directory cannot be renamed onto one that is not empty
            try:
                os.replace(temporary, target)
            except OSError:
                if old.exists():
                    os.replace(old, target)
                raise
            fsync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if target.exists():
                # on NFS, a file that is still open keeps its folder
                shutil.rmtree(old, ignore_errors=True)


def _sibling(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")


def fsync(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on disk. Raises OSError for what
    the file system reports only now: NFS and quotas do so when a disk is full."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # several network file systems refuse it for directories
            raise
    finally:
        os.close(descriptor)


def canonical_json(value: Any) -> str:
    """The same text for equal values (sorted keys, no spaces), to be hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256_text(text: str) -> str:
    """Hexadecimal SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def sha256_weights(path: str | os.PathLike[str]) -> str:
    """SHA-256 over the tensors of a safetensors file: name, dtype, shape, bytes, in order of name,
    so that another version of a library that saves the same weights keeps it. Raises ContractError
    for another or a truncated file."""
    header = read_header(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for name, entry in sorted(header.entries.items()):
            digest.update(canonical_json([name, entry.dtype, list(entry.shape)]).encode())
            file.seek(header.data_start + entry.start)
            remaining = entry.stop - entry.start
            while remaining:
                block = file.read(min(remaining, 1 << 22))
                if not block:
                    raise ContractError(f"{path} ends inside {name}; copy or export it again")
                digest.update(block)
                remaining -= len(block)
    return digest.hexdigest()


def files_sha256(paths: Iterable[Path]) -> str:
    """SHA-256 over files of weights, in this order."""
    hashes = [
        sha256_weights(path) if path.suffix == ".safetensors" else sha256_file(path)
        for path in paths
    ]
    return hashes[0] if len(hashes) == 1 else sha256_text(canonical_json(hashes))


Record = TypeVar("Record", bound="VersionedRecord")


@dataclass(frozen=True, kw_only=True)
class VersionedRecord:
    """A dataclass stored as JSON with its kind and format version; reading rejects any other."""

    KIND: ClassVar[str] = ""
    VERSION: ClassVar[int] = 1

    def to_json(self) -> str:
        body = {"kind": self.KIND, "format_version": self.VERSION, **dataclasses.asdict(self)}
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
    versions: dict[str, str] = field(default_factory=dict)  # of the libraries that wrote it

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
    # hashes of the LLM's settings and of its tokenizer; "" in a record from before they were part
    # of the fingerprint
    config_sha256: str = ""
    tokenizer_sha256: str = ""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that changes an embedding, so not over where the weights are."""
        body = dataclasses.asdict(self)
        del body["llm"], body["revision"], body["adapter"]
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
    query_prompt: str  # precedes queries in training and in caption retrieval; not pooled
    chat_template: str  # literal text around "{caption}"; "" for none
    include_bos: bool
    max_tokens: int
    post_sha256: str = ""  # sha256_weights of the centering or whitening parameters; "" for none
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
    shards: dict[str, dict[str, Any]]  # shard name -> {"file", "samples", "captions", "truncated"}
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
    command: dict[str, Any] = field(default_factory=dict)  # files.started_by


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
    command: dict[str, Any] = field(default_factory=dict)  # files.started_by


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
    epoch_samples: int = 0  # image-caption pairs of one pass over the data; 0: not recorded
    # how it was started last: files.started_by
    command: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    wandb: str = ""  # id of the run in Weights & Biases


@dataclass(kw_only=True)
class Metrics:
    """A summary of metrics.jsonl."""

    step: int = 0  # the last one with a line
    samples: int = 0
    loss: float | None = None
    # of the last steps
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RATE_LINES))
    # images/s of a loader process, and of steps that wait for no data, of the last lines
    loading: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=RATE_LINES))
    # step -> headline scores; 0: before training
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    ended: dict[str, Any] | None = None  # the event after which no step followed
    save_failed: dict[str, Any] | None = None  # the event after which no checkpoint was complete
    unreadable: int = 0  # lines

    def add(self, line: dict[str, Any]) -> None:
        """Raises ValueError, KeyError or TypeError for a line of another kind."""
        step = int(line["step"])
        event = line.get("event")
        if event in (files.STOPPED, files.FAILED):
            self.ended = line
        elif event in (files.SAVE_FAILED, files.SAVED):
            self.save_failed = line if event == files.SAVE_FAILED else None
        elif event is None and "loss" in line:
            self.step = step
            self.samples = int(line["samples"])
            self.loss = float(line["loss"])
            self.ended = None
            self.seconds.extend([float(line["step_seconds"])] if "step_seconds" in line else [])
            if one := line.get("loader_images_per_second"):
                self.loading.append(
                    (float(one), line["samples_per_second"] / max(1 - line["wait_share"], 1e-3))
                )
        elif event is None:
            scores = {
                name: float(value)
                for name, value in line.items()
                if name not in ("step", "samples")
            }
            self.scores[step] = {name: scores[name] for name in files.headline(scores)}

    def loader(self) -> str:
        """How many loader processes the steps need, over all ranks; "" if no line says."""
        if not self.loading:
            return ""
        one, needed = (median(column) for column in zip(*self.loading, strict=True))
        rates = f"a process delivers {one:,.1f} images/s, the steps take {needed:,.1f}"
        return f"{rates}: --workers, over all ranks, {math.ceil(needed / one)}"


def read_metrics(path: Path) -> Metrics:
    """Read the file line by line; lines that are damaged, or cut short by a kill, are counted."""
    metrics = Metrics()
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    metrics.add(json.loads(text))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    metrics.unreadable += 1
    return metrics


@dataclass(frozen=True, kw_only=True)
class ScoreFile(VersionedRecord):
    """Scores of a model on a benchmark: metrics, and every item for paired statistics."""

    KIND: ClassVar[str] = "llm2clip-scores"

    benchmark: str
    metrics: dict[str, float]
    items: list[dict[str, Any]]  # {"id", "score", "cluster", ...} per question; cluster = its image
    counts: dict[str, int] = field(default_factory=dict)  # missing, duplicate, unparsable ...
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
