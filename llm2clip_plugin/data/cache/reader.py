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
| row_checks     | (R,)   | int64        | CRC-32 of number, scale and row; compared at every read   |
| image_checks   | (N,)   | int64        | size and CRC-32 of the image file; 0: not recorded           |

image_checks is absent where images were not read.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from llm2clip_plugin.contracts import CacheManifest, ContractError, TeacherIdentity
from llm2clip_plugin.data.cache.dtypes import CACHE_DTYPES
from llm2clip_plugin.data.cache.proof import check_captions
from llm2clip_plugin.data.cache.rerun import redo
from llm2clip_plugin.data.cache.rows import row_numbers
from llm2clip_plugin.data.cache.shard_file import ShardFile, image_check
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.index_file import stamps_of
from llm2clip_plugin.data.sources.records import BrokenSample, Caption

OPEN_SHARDS = 64  # files that one process keeps open
FEW = 16  # shards whose headers are read at every start
ENTRY = ("file", "samples", "captions", "truncated", "rows_sha256", "sha256")  # of a shard in the manifest


class EmbeddingCache:
    """A complete cache, opened for reading. The files of the last shards used stay open."""

    def __init__(self, directory: Path, manifest: CacheManifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._files: OrderedDict[str, ShardFile] = OrderedDict()  # last used last

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
            raise ContractError(f"{path} is incomplete: embedding has not finished; {redo(path)}")
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
        cache._check_files()
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
        """Of the teacher."""
        return self.manifest.fingerprint

    def __getstate__(self) -> dict[str, object]:
        # a worker opens the files itself
        return {"directory": self.directory, "manifest": self.manifest, "_files": OrderedDict()}

    def _check_files(self) -> None:
        """Raise ContractError for a file that is missing or has another size than the manifest says.

        The headers of few files, and of those without a recorded size, are compared too; the others' when they are
        first read (``shard``).
        """
        entries = self.manifest.shards
        stamps = stamps_of([str(self.directory / entry["file"]) for entry in entries.values()])
        for (name, entry), stamp in zip(entries.items(), stamps, strict=True):
            path = self.directory / entry["file"]
            if stamp is None:
                raise ContractError(f"{path} is missing, but the manifest lists shard {name!r}; {redo(path)}")
            if len(entries) <= FEW or "bytes" not in entry:
                self.shard(name)
            elif stamp[0] != entry["bytes"]:
                raise ContractError(f"{path} has {stamp[0]} bytes, expected {entry['bytes']}; {redo(path)}")

    def shard(self, name: str) -> ShardFile:
        """A shard's file; raises ContractError if it is missing or differs from the manifest."""
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        entry = self.manifest.shards.get(name)
        if entry is None:
            known = ", ".join([*self.manifest.shards][:5]) + ", ..." * (len(self.manifest.shards) > 5)
            raise ContractError(f"{self.directory} has no shard {name!r}; known: {known}; {redo(self.directory)}")
        path = self.directory / entry["file"]
        try:
            file = ShardFile(path)
        except FileNotFoundError as error:
            raise ContractError(f"{path} is missing, but the manifest lists shard {name!r}; {redo(path)}") from error
        actual = {"width": file.width, "samples": file.samples, "captions": file.captions, **file.meta}
        expected = {"fingerprint": self.fingerprint, "width": self.width, "dtype": self.manifest.dtype, **entry}
        expected |= {"truncated": str(entry["truncated"])}
        if wrong := [name for name, value in expected.items() if name in actual and actual[name] != value]:
            both = "; ".join(f"{name} is {actual[name]!r}, not {expected[name]!r}" for name in wrong)
            raise ContractError(f"{path} differs from the manifest: {both}; {redo(path)}")
        self._files[name] = file
        if len(self._files) > OPEN_SHARDS:
            self._files.popitem(last=False)
        return file

    def rows(self, shard_name: str, index_in_shard: int, captions: Sequence[Caption], *, key: str = "") -> torch.Tensor:
        """(len(captions), W) float32: the embeddings of a sample's captions, in the captions' order.

        key: the sample's key, compared with the cache's unless "". Raises ContractError if the key or a caption is not
        the one that was embedded.
        """
        file = self.shard(shard_name)
        return file.embeddings(row_numbers(file, index_in_shard, captions, key))

    def check_image(self, shard_name: str, index_in_shard: int, key: str, data: bytes) -> None:
        """Raises BrokenSample if a sample's image is not the one that it had when its captions were embedded."""
        file = self.shard(shard_name)
        recorded = file.image_check(index_in_shard)
        if recorded and image_check(data) != recorded:
            raise BrokenSample(
                shard_name,
                key,
                f"its image was changed or exchanged after its captions were embedded ({len(data)} bytes, "
                f"{recorded >> 32} then); restore it, or delete {file.path} and {redo(file.path)}",
            )

    def check(self, source: Source, *, full: bool = False) -> None:
        """Compare the cache with a source: shard names, counts, keys and the hash of every caption.

        The captions are read where digests don't show that they are the cache's, or everywhere with ``full``. Raises
        ContractError at the first difference, with both values.
        """
        check_captions(source, self.manifest.shards, self.shard, full=full)

    def verify(self) -> None:
        """Read every byte and compare each shard's SHA-256 with the manifest's. Raises ContractError."""
        for name in self.manifest.shards:
            file = self.shard(name)
            if damage := file.damage():
                raise ContractError(f"{file.path} is damaged: {damage}; {redo(file.path)}")


def differences(stored: Mapping[str, object], yours: TeacherIdentity) -> str:
    """The settings that differ between two teachers, with both values."""
    settings = [
        f"{name} {stored.get(name)!r} != {value!r}"
        for name, value in vars(yours).items()
        if stored.get(name) != value and name != "adapter"  # adapter_sha256 says which one it is
    ]
    return "; ".join(settings) or "the same settings"


def _refuse_damaged(manifest: CacheManifest, path: Path) -> None:
    """ContractError unless a manifest agrees with itself: dtype, entries, and its teacher's fingerprint and width."""
    for name, entry in manifest.shards.items():
        file = str(entry.get("file", ""))
        if os.path.isabs(file) or os.path.normpath(file).startswith(".."):
            raise ContractError(f"{path.parent}: the file of shard {name!r}, {file!r}, is outside the cache")
        if missing := [value for value in ENTRY if value not in entry]:
            raise ContractError(f"{path}: the entry of shard {name!r} is missing {', '.join(missing)}; {redo(path)}")
    if manifest.dtype not in CACHE_DTYPES:
        raise ContractError(f"{path} has unknown dtype {manifest.dtype!r}; known: {', '.join(CACHE_DTYPES)}")
    try:
        teacher = TeacherIdentity(**manifest.teacher)
    except TypeError as error:
        raise ContractError(f"{path}: its teacher has unknown or missing settings ({error}); {redo(path)}") from error
    if teacher.fingerprint != manifest.fingerprint or teacher.width != manifest.width:
        raise ContractError(
            f"{path} was edited: it has fingerprint {manifest.fingerprint} and width {manifest.width}, its teacher's "
            f"settings give {teacher.fingerprint} and {teacher.width}; {redo(path)}"
        )
