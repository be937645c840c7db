"""The embedding cache: one safetensors file a shard, and a manifest that says whose embeddings they are.

```
<directory>/manifest.json             CacheManifest; complete = false while a run is at work
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
from llm2clip_plugin.data.cache.shard_file import REDO, TENSORS, ShardFile, tensors_digest
from llm2clip_plugin.data.sources.records import Caption, caption_hash, hash_hex

CACHE_DTYPES = ("float16", "int8")
ENTRY = ("file", "samples", "captions", "truncated", "rows_sha256", "sha256")  # of a shard in the manifest


def has_text(caption: Caption) -> bool:
    """Blank captions get no embedding; everything that joins captions and rows asks here."""
    return bool(caption.text.strip())


class EmbeddingCache:
    """A complete cache, opened for reading; its files are mapped, so any number of processes share the memory."""

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

        Raises FileNotFoundError without one, ContractError if it is another teacher's, of another width, incomplete, or
        a shard is missing or cut short; the message has both values.
        """
        directory = Path(directory)
        path = directory / CacheManifest.FILE
        manifest = CacheManifest.read(path)
        if not manifest.complete:
            raise ContractError(f"{path} is incomplete: embedding has not finished; {REDO}")
        refuse_damaged(manifest, path)
        if expect_fingerprint is not None and manifest.fingerprint != expect_fingerprint:
            raise ContractError(
                f"{directory} holds embeddings of {manifest.teacher['llm']} with fingerprint {manifest.fingerprint}, "
                f"expected fingerprint {expect_fingerprint}; embed with the expected LLM, or choose its cache"
            )
        if expect_width is not None and manifest.width != expect_width:
            raise ContractError(
                f"{directory} holds embeddings of width {manifest.width} ({manifest.teacher['llm']}), expected "
                f"{expect_width}; choose the cache of the LLM that the text adapter was made for"
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
        """Whose embeddings these are."""
        return TeacherIdentity(**self.manifest.teacher)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the teacher."""
        return self.manifest.fingerprint

    def __getstate__(self) -> dict[str, object]:
        return {"directory": self.directory, "manifest": self.manifest, "_files": {}}  # maps are made anew in a worker

    def shard(self, name: str) -> ShardFile:
        """A shard's file; raises ContractError if the cache lacks it or the file is not what the manifest says."""
        if name in self._files:
            return self._files[name]
        entry = self.manifest.shards.get(name)
        if entry is None:
            known = ", ".join(list(self.manifest.shards)[:5])
            raise ContractError(
                f"{self.directory} has no shard {name!r}; its {len(self.manifest.shards)} shards are {known} ...; "
                f"{REDO}"
            )
        path = self.directory / entry["file"]
        if not path.resolve().is_relative_to(self.directory.resolve()):
            raise ContractError(
                f"{self.directory}: the file of shard {name!r}, {entry['file']!r}, lies outside the cache"
            )
        if not path.is_file():
            raise ContractError(f"{path} is missing: the manifest lists shard {name!r}; {REDO}")
        file = ShardFile(path)
        found = (file.meta["fingerprint"], file.width, file.samples, file.captions, file.meta["rows_sha256"])
        expected = (self.fingerprint, self.width, entry["samples"], entry["captions"], entry["rows_sha256"])
        if found != expected:
            raise ContractError(
                f"{path} is not the shard of the manifest: (fingerprint, width, samples, captions, rows) is {found}, "
                f"expected {expected}; {REDO}"
            )
        self._files[name] = file
        return file

    def rows(self, shard_name: str, index_in_shard: int, captions: Sequence[Caption], *, key: str = "") -> torch.Tensor:
        """(len(captions), W) float32: the embeddings of a sample's captions, in the captions' order.

        key: the sample's key, compared with the cache's if given. Raises ContractError if the key or a caption is not
        the one that was embedded.
        """
        file = self.shard(shard_name)
        if not 0 <= index_in_shard < file.samples:
            raise ContractError(
                f"{file.path}: sample {index_in_shard} asked for, the shard had {file.samples} when embedded; {REDO}"
            )
        if key and file.key(index_in_shard) != key:
            raise ContractError(
                f"{file.path}: sample {index_in_shard} has key {key!r} in the data, "
                f"{file.key(index_in_shard)!r} in the cache; {REDO}"
            )
        start, stop = file.span(index_in_shard)
        position = {int(value): row for row, value in enumerate(file["caption_hashes"][start:stop], start)}
        picked = []
        for caption in captions:
            row = position.get(caption_hash(caption.text))
            if row is None:
                raise ContractError(self._changed(file, index_in_shard, caption, position))
            picked.append(row)
        return file.embeddings(picked)

    def _changed(self, file: ShardFile, index: int, caption: Caption, known: Mapping[int, int]) -> str:
        """The message for a caption that was not embedded."""
        there = ", ".join(map(hash_hex, known)) or "none"
        text = caption.text if len(caption.text) <= 60 else caption.text[:57] + "..."
        digest = hash_hex(caption_hash(caption.text))
        reason = f"(hash {digest}) was not embedded" if has_text(caption) else "is blank"
        return (
            f"{file.path}: sample {file.key(index)!r}: caption {text!r} {reason}; the cache holds hashes {there}; "
            f"{REDO}"
        )

    def check(self, source) -> None:
        """Hold the cache against a source: shard names, counts, keys and the hash of every caption.

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
                if file.key(index) != key:
                    raise ContractError(
                        f"{file.path}: sample {index} of shard {shard.name!r} has key {key!r} in {source.path}, "
                        f"{file.key(index)!r} in the cache; {REDO}"
                    )
                start, stop = file.span(index)
                known = {int(value): row for row, value in enumerate(file["caption_hashes"][start:stop], start)}
                for caption in captions:
                    if has_text(caption) and caption_hash(caption.text) not in known:
                        raise ContractError(self._changed(file, index, caption, known))

    def verify(self) -> None:
        """Read every byte: each shard's tensors must have the SHA-256 of the manifest."""
        for name, entry in self.manifest.shards.items():
            file = self.shard(name)
            found = tensors_digest({tensor: file[tensor] for tensor in TENSORS})
            if found != entry["sha256"]:
                raise ContractError(
                    f"{file.path} is damaged: SHA-256 {found}, the manifest says {entry['sha256']}; delete it, then "
                    f"{REDO}"
                )


def differences(found: Mapping[str, object], expected: TeacherIdentity) -> str:
    """Which settings of two teachers differ, with both values."""
    wanted = vars(expected)
    named = [
        f"{name} {found.get(name)!r}, yours {wanted[name]!r}" for name in wanted if found.get(name) != wanted[name]
    ]
    return "; ".join(named) or "the same settings"


def refuse_damaged(manifest: CacheManifest, path: Path) -> None:
    """A manifest must agree with itself: known dtype, whole entries, fingerprint and width of its own teacher."""
    for name, entry in manifest.shards.items():
        if missing := [value for value in ENTRY if value not in entry]:
            raise ContractError(f"{path}: its entry of shard {name!r} lacks {', '.join(missing)}; {REDO}")
    if manifest.dtype not in CACHE_DTYPES:
        raise ContractError(f"{path} has dtype {manifest.dtype!r}; known: {', '.join(CACHE_DTYPES)}")
    try:
        teacher = TeacherIdentity(**manifest.teacher)
    except TypeError as error:
        raise ContractError(f"{path}: its teacher is not what this release writes ({error}); {REDO}") from error
    if teacher.fingerprint != manifest.fingerprint or teacher.width != manifest.width:
        raise ContractError(
            f"{path} was changed by hand: fingerprint {manifest.fingerprint} and width {manifest.width}, its "
            f"teacher gives {teacher.fingerprint} and {teacher.width}; {REDO}"
        )
