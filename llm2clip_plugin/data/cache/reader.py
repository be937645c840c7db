"""The embedding cache: one safetensors file per shard, and a manifest that names the teacher.

```
<directory>/manifest.json             CacheManifest; complete = false until embedding has finished
<directory>/<shard name>.safetensors  the rows of one shard
```

Tensors of a shard with N samples and R captions (blank captions have no row, equal captions of one sample share one):

| name           | shape  | dtype        | meaning                                                      |
|----------------|--------|--------------|--------------------------------------------------------------|
| embeddings     | (R, W) | float16/int8 | embedding = row x scale                                      |
| scales         | (R,)   | float32      | 1 for float16 rows that fit, else a power of two; int8: max/127 |
| row_starts     | (N+1,) | int64        | sample i owns the rows row_starts[i] .. row_starts[i+1]      |
| caption_hashes | (R,)   | int64        | first 64 bits of the caption's SHA-256                       |
| keys           | (K,)   | uint8        | the sample keys, UTF-8, one after the other                  |
| key_starts     | (N+1,) | int64        | where each key starts                                        |
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from llm2clip_plugin.contracts import CacheManifest, ContractError, TeacherIdentity
from llm2clip_plugin.data.cache.shard_file import CACHE_DTYPES, REDO, TENSORS, ShardFile, tensors_digest
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.records import Caption, caption_hash, hash_hex

ENTRY = ("file", "samples", "captions", "truncated", "rows_sha256", "sha256")  # of a shard in the manifest


def has_text(caption: Caption) -> bool:
    """Whether a caption gets an embedding: blank ones don't."""
    return bool(caption.text.strip())


class EmbeddingCache:
    """A complete cache, opened for reading. Its files are memory-mapped: local processes share their pages."""

    def __init__(self, directory: Path, manifest: CacheManifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._files: dict[str, ShardFile] = {}

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        *,
        expect_fingerprint: str | None = None,
        expect_width: int | None = None,
    ) -> EmbeddingCache:
        """Open a cache.

        Raises FileNotFoundError if there is none, ContractError if its teacher or width differs, it is incomplete,
        or a shard is missing or truncated; the message has both values.
        """
        directory = Path(directory)
        path = directory / CacheManifest.FILE
        manifest = CacheManifest.read(path)
        if not manifest.complete:
            raise ContractError(f"{path} is incomplete: embedding has not finished; {REDO}")
        _refuse_damaged(manifest, path)
        if expect_fingerprint is not None and manifest.fingerprint != expect_fingerprint:
            raise ContractError(
                f"{directory} contains embeddings of {manifest.teacher['llm']} with fingerprint "
                f"{manifest.fingerprint}, expected fingerprint {expect_fingerprint}; "
                "embed with the expected LLM, or use its cache"
            )
        if expect_width is not None and manifest.width != expect_width:
            raise ContractError(
                f"{directory} contains embeddings of width {manifest.width} ({manifest.teacher['llm']}), expected "
                f"{expect_width}; use the cache of the LLM that the text adapter was made for"
            )
        cache = cls(directory, manifest)
        for shard in manifest.shards:
            cache.shard(shard)
        return cache

    @property
    def width(self) -> int:
        """Width W of an embedding."""
        return self.manifest.width

    @property
    def teacher(self) -> TeacherIdentity:
        """The teacher that the embeddings come from."""
        return TeacherIdentity(**self.manifest.teacher)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the teacher."""
        return self.manifest.fingerprint

    def __getstate__(self) -> dict[str, object]:
        return {"directory": self.directory, "manifest": self.manifest, "_files": {}}  # a worker maps the files itself

    def shard(self, name: str) -> ShardFile:
        """A shard's file; raises ContractError if it is missing or differs from the manifest."""
        if name in self._files:
            return self._files[name]
        entry = self.manifest.shards.get(name)
        if entry is None:
            known = ", ".join(list(self.manifest.shards)[:5])
            raise ContractError(
                f"{self.directory} has no shard {name!r}; known: {known}"
                + (f" ... ({len(self.manifest.shards)} shards)" if len(self.manifest.shards) > 5 else "")
                + f"; {REDO}"
            )
        path = self.directory / entry["file"]
        if not path.resolve().is_relative_to(self.directory.resolve()):
            raise ContractError(
                f"{self.directory}: the file of shard {name!r}, {entry['file']!r}, is outside the cache"
            )
        if not path.is_file():
            raise ContractError(f"{path} is missing, but the manifest lists shard {name!r}; {REDO}")
        file = ShardFile(path)
        actual = (file.meta["fingerprint"], file.width, file.samples, file.captions, file.meta["rows_sha256"])
        expected = (self.fingerprint, self.width, entry["samples"], entry["captions"], entry["rows_sha256"])
        if actual != expected:
            raise ContractError(
                f"{path} differs from the manifest: (fingerprint, width, samples, captions, rows) is {actual}, "
                f"expected {expected}; {REDO}"
            )
        self._files[name] = file
        return file

    def rows(self, shard_name: str, index_in_shard: int, captions: Sequence[Caption], *, key: str = "") -> torch.Tensor:
        """(len(captions), W) float32: the embeddings of a sample's captions, in the captions' order.

        key: the sample's key, compared with the cache's unless "". Raises ContractError if the key or a caption is not
        the one that was embedded.
        """
        file = self.shard(shard_name)
        return file.embeddings(_row_numbers(file, shard_name, index_in_shard, captions, key, "the data"))

    def check(self, source: Source) -> None:
        """Compare the cache with a source: shard names, counts, keys and the hash of every caption.

        Raises ContractError at the first difference, with both values.
        """
        for shard in source.shards:
            file = self.shard(shard.name)
            if file.samples != shard.size:
                raise ContractError(
                    f"{file.path}: shard {shard.name!r} has {shard.size} samples in {source.path}, {file.samples} "
                    f"when it was embedded; {REDO}"
                )
            for index in range(shard.size):
                key, captions = source.captions(shard.start + index)
                _row_numbers(file, shard.name, index, list(filter(has_text, captions)), key, source.path)

    def verify(self) -> None:
        """Read every byte and compare each shard's SHA-256 with the manifest's. Raises ContractError."""
        for name, entry in self.manifest.shards.items():
            file = self.shard(name)
            digest = tensors_digest({tensor: file[tensor] for tensor in TENSORS})
            if digest != entry["sha256"]:
                raise ContractError(
                    f"{file.path} is damaged: SHA-256 {digest}, expected {entry['sha256']}; delete it and {REDO}"
                )


def _row_numbers(
    file: ShardFile, shard: str, index: int, captions: Sequence[Caption], key: str, data: str
) -> list[int]:
    """Row of each caption of a sample; ContractError if the sample, its ``key`` or a caption was not embedded."""
    if not 0 <= index < file.samples:
        raise ContractError(
            f"{file.path} has no sample {index}: shard {shard!r} had {file.samples} samples when it was embedded; "
            f"{REDO}"
        )
    if key and file.key(index) != key:
        raise ContractError(
            f"{file.path}: sample {index} of shard {shard!r} has key {key!r} in {data}, {file.key(index)!r} in the "
            f"cache; {REDO}"
        )
    row_of = file.row_numbers(index)
    hashes = [caption_hash(caption.text) for caption in captions]
    for value, caption in zip(hashes, captions, strict=True):
        if value not in row_of:
            known = ", ".join(map(hash_hex, row_of)) or "none"
            text = caption.text if len(caption.text) <= 60 else caption.text[:57] + "..."
            reason = f"(hash {hash_hex(value)}) was not embedded" if has_text(caption) else "is blank"
            raise ContractError(
                f"{file.path}: sample {file.key(index)!r}: caption {text!r} {reason}; cached caption hashes: {known}; "
                f"{REDO}"
            )
    return [row_of[value] for value in hashes]


def differences(stored: Mapping[str, object], yours: TeacherIdentity) -> str:
    """The settings that differ between two teachers, with both values."""
    settings = [
        f"{name} {stored.get(name)!r} != {value!r}" for name, value in vars(yours).items() if stored.get(name) != value
    ]
    return "; ".join(settings) or "the same settings"


def _refuse_damaged(manifest: CacheManifest, path: Path) -> None:
    """ContractError unless a manifest agrees with itself: dtype, entries, and its teacher's fingerprint and width."""
    for name, entry in manifest.shards.items():
        if missing := [value for value in ENTRY if value not in entry]:
            raise ContractError(f"{path}: the entry of shard {name!r} is missing {', '.join(missing)}; {REDO}")
    if manifest.dtype not in CACHE_DTYPES:
        raise ContractError(f"{path} has unknown dtype {manifest.dtype!r}; known: {', '.join(CACHE_DTYPES)}")
    try:
        teacher = TeacherIdentity(**manifest.teacher)
    except TypeError as error:
        raise ContractError(f"{path}: its teacher has unknown or missing settings ({error}); {REDO}") from error
    if teacher.fingerprint != manifest.fingerprint or teacher.width != manifest.width:
        raise ContractError(
            f"{path} was edited: it has fingerprint {manifest.fingerprint} and width {manifest.width}, its teacher's "
            f"settings give {teacher.fingerprint} and {teacher.width}; {REDO}"
        )
