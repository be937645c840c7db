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

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from llm2clip_plugin.contracts import (
    CacheManifest,
    ContractError,
    TeacherIdentity,
    canonical_json,
    sha256_text,
    whole_file,
)
from llm2clip_plugin.data.cache_shard import META, REDO, TENSORS, ShardFile, tensors_digest
from llm2clip_plugin.data.records import Caption, caption_hash, caption_id

DTYPES = ("float16", "int8")
INT8_COSINE = 0.999  # the least that int8 may keep of a row's direction
FLOAT16_SAFE = 32768.0  # larger rows are stored halved until they fit (float16 ends at 65504)


def hash_to_int(digest: str) -> int:
    """A caption's 16 hex characters as a signed 64-bit number."""
    return int.from_bytes(bytes.fromhex(digest), "big", signed=True)


def has_text(caption: Caption) -> bool:
    """Blank captions get no embedding; everything that joins captions and rows asks here."""
    return bool(caption.text.strip())


def caption_rows(captions: Iterable[Sequence[Caption]]) -> list[tuple[int, str]]:
    """The rows of a shard: (index of the sample, caption hash) for each distinct caption with text, in order."""
    rows: list[tuple[int, str]] = []
    for index, of_sample in enumerate(captions):
        distinct = dict.fromkeys(caption_hash(caption.text) for caption in of_sample if has_text(caption))
        rows.extend((index, digest) for digest in distinct)
    return rows


def rows_digest(keys: Sequence[str], rows: Sequence[tuple[int, str]]) -> str:
    """Identity of what a shard's rows belong to: changes with any key, caption or order."""
    return sha256_text(canonical_json([list(keys), [list(row) for row in rows]]))


def quantize(embeddings: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, W) float32 -> stored rows (R, W) in ``dtype`` and scales (R,) float32, row x scale being the embedding."""
    largest = embeddings.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    if dtype == "int8":
        scales = largest / 127.0
        return (embeddings / scales[:, None]).round_().to(torch.int8), scales
    scales = torch.exp2(torch.ceil(torch.log2(largest / FLOAT16_SAFE)).clamp_min(0.0))
    return (embeddings / scales[:, None]).to(torch.float16), scales


class CacheWriter:
    """Writes the shards of one cache; any number of ranks may write different shards of one directory.

    Raises ContractError if the directory holds another teacher's, or another dtype's, embeddings.
    """

    def __init__(self, directory: str | os.PathLike[str], identity: TeacherIdentity, dtype: str = "float16") -> None:
        if dtype not in DTYPES:
            raise ValueError(f"unknown cache dtype {dtype!r}; known: {', '.join(DTYPES)}")
        self.directory = Path(directory)
        self.identity = identity
        self.dtype = dtype
        self._written: list[str] = []
        manifest = self.directory / CacheManifest.FILE
        if manifest.is_file():
            self._refuse_another(CacheManifest.read(manifest), manifest)
        else:
            self._manifest({}, complete=False).write(manifest)

    def _refuse_another(self, found: CacheManifest, path: Path) -> None:
        """Stop if the directory belongs to another teacher or is stored otherwise."""
        if found.fingerprint != self.identity.fingerprint:
            raise ContractError(
                f"{path} belongs to another teacher ({differences(found.teacher, self.identity)}; fingerprint "
                f"{found.fingerprint[:12]}, yours is {self.identity.fingerprint[:12]}); choose another --cache"
            )
        if found.dtype != self.dtype:
            raise ContractError(
                f"{path} stores {found.dtype}, you asked for {self.dtype}; "
                f"choose another --cache or --dtype {found.dtype}"
            )

    def _manifest(self, shards: dict[str, dict[str, object]], *, complete: bool) -> CacheManifest:
        return CacheManifest(
            teacher=dict(vars(self.identity)),
            fingerprint=self.identity.fingerprint,
            dtype=self.dtype,
            width=self.identity.width,
            shards=shards,
            complete=complete,
        )

    def path(self, shard: str) -> Path:
        """The file of a shard."""
        return self.directory / shard_file(shard)

    def is_whole(self, shard: str, keys: Sequence[str], rows: Sequence[tuple[int, str]]) -> bool:
        """Whether the shard's file is there, not cut short, and of these keys and captions by this teacher."""
        path = self.path(shard)
        if not path.is_file():
            return False
        try:
            meta = ShardFile(path).meta
        except ContractError:
            return False
        return (
            meta.get("fingerprint") == self.identity.fingerprint
            and meta.get("dtype") == self.dtype
            and meta.get("rows_sha256") == rows_digest(keys, rows)
        )

    def write_shard(
        self,
        shard: str,
        keys: Sequence[str],
        rows: Sequence[tuple[int, str]],
        embeddings: torch.Tensor,
        *,
        truncated: int = 0,
    ) -> None:
        """Write one shard whole.

        shard: name, as the source gives it; keys: of its N samples; rows: R pairs (sample index, caption hash) in order
        of sample; embeddings: (R, W) float; truncated: captions that were longer than the teacher's maximum.
        Raises ValueError for a wrong shape or a non-finite row, ContractError if int8 loses too much.
        """
        embeddings = embeddings.float()
        shape, expected = tuple(embeddings.shape), (len(rows), self.identity.width)
        if shape != expected:
            raise ValueError(f"shard {shard}: embeddings of shape {shape}, expected {expected}")
        indices = [index for index, _ in rows]
        if indices != sorted(indices) or (indices and not 0 <= indices[0] <= indices[-1] < len(keys)):
            raise ValueError(f"shard {shard}: rows must be in order of sample, with indices under {len(keys)}")
        finite = torch.isfinite(embeddings).all(dim=1)
        if not bool(finite.all()):
            worst = int((~finite).nonzero()[0])
            raise ValueError(f"shard {shard}: the embedding of a caption of {keys[indices[worst]]!r} is not finite")
        stored, scales = quantize(embeddings, self.dtype)
        self._hold_direction(shard, embeddings, stored)
        encoded = [key.encode() for key in keys]
        tensors = {
            "embeddings": stored,
            "scales": scales,
            "row_starts": torch.tensor(np.searchsorted(indices, np.arange(len(keys) + 1)), dtype=torch.int64),
            "caption_hashes": torch.tensor([hash_to_int(digest) for _, digest in rows], dtype=torch.int64),
            "keys": torch.from_numpy(np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()),
            "key_starts": torch.tensor(np.cumsum([0, *map(len, encoded)]), dtype=torch.int64),
        }
        metadata = {
            "shard": shard,
            "fingerprint": self.identity.fingerprint,
            "dtype": self.dtype,
            "rows_sha256": rows_digest(keys, rows),
            "sha256": tensors_digest({name: tensor.numpy() for name, tensor in tensors.items()}),
            "truncated": str(truncated),
        }
        with whole_file(self.path(shard)) as aside:
            save_file(tensors, str(aside), metadata={META: canonical_json(metadata)})  # one entry: their order varies
        self._written.append(shard)

    def _hold_direction(self, shard: str, embeddings: torch.Tensor, stored: torch.Tensor) -> None:
        """int8 is refused where a few huge dimensions would leave nothing of the others."""
        if self.dtype != "int8" or not len(embeddings):
            return
        cosine = torch.nn.functional.cosine_similarity(embeddings, stored.float(), dim=1)
        cosine = cosine[embeddings.abs().amax(dim=1) > 0]
        if len(cosine) and float(cosine.min()) < INT8_COSINE:
            raise ContractError(
                f"shard {shard}: int8 keeps a cosine similarity of only {float(cosine.min()):.5f} to the embedding, "
                f"{INT8_COSINE} is the least allowed; use --dtype float16"
            )

    def finish(self, shards: Sequence[str] | None = None) -> CacheManifest | None:
        """Write the complete manifest if every shard is there, and return it; None while other ranks still write.

        shards: the names that must be there; by default those that this writer wrote. What the manifest listed before
        stays, so the splits of a data set share a directory.
        """
        path = self.directory / CacheManifest.FILE
        entries: dict[str, dict[str, object]] = {
            name: entry for name, entry in CacheManifest.read(path).shards.items() if self.path(name).is_file()
        }
        for shard in self._written if shards is None else shards:
            if not self.path(shard).is_file():
                return None
            file = ShardFile(self.path(shard))
            entries[shard] = {
                "file": shard_file(shard),
                "samples": file.samples,
                "captions": file.captions,
                "truncated": int(file.meta["truncated"]),
                "rows_sha256": file.meta["rows_sha256"],
                "sha256": file.meta["sha256"],
            }
        manifest = self._manifest(entries, complete=True)
        manifest.write(path)
        return manifest


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
            row = position.get(caption_id(caption.text))
            if row is None:
                raise ContractError(self._changed(file, index_in_shard, caption, position))
            picked.append(row)
        return file.embeddings(picked)

    def _changed(self, file: ShardFile, index: int, caption: Caption, known: Mapping[int, int]) -> str:
        """The message for a caption that was not embedded."""
        there = ", ".join(int(value).to_bytes(8, "big", signed=True).hex() for value in known) or "none"
        text = caption.text if len(caption.text) <= 60 else caption.text[:57] + "..."
        reason = "is blank" if not has_text(caption) else f"(hash {caption_hash(caption.text)}) was not embedded"
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
                    if has_text(caption) and caption_id(caption.text) not in known:
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


def shard_file(shard: str) -> str:
    """The file name of a shard, relative to the cache; a name that could leave the folder is hashed instead."""
    parts = Path(shard).parts
    if not parts or Path(shard).is_absolute() or ".." in parts:
        return f"shard-{hashlib.sha256(shard.encode()).hexdigest()[:16]}.safetensors"
    return f"{shard}.safetensors"


def differences(found: Mapping[str, object], expected: TeacherIdentity) -> str:
    """Which settings of two teachers differ, with both values."""
    wanted = vars(expected)
    named = [
        f"{name} {found.get(name)!r}, yours {wanted[name]!r}" for name in wanted if found.get(name) != wanted[name]
    ]
    return "; ".join(named) or "the same settings"


def refuse_damaged(manifest: CacheManifest, path: Path) -> None:
    """A manifest must agree with itself: known dtype, and the fingerprint and width of its own teacher."""
    if manifest.dtype not in DTYPES:
        raise ContractError(f"{path} has dtype {manifest.dtype!r}; known: {', '.join(DTYPES)}")
    try:
        teacher = TeacherIdentity(**manifest.teacher)
    except TypeError as error:
        raise ContractError(f"{path}: its teacher is not what this release writes ({error}); {REDO}") from error
    if teacher.fingerprint != manifest.fingerprint or teacher.width != manifest.width:
        raise ContractError(
            f"{path} was changed by hand: fingerprint {manifest.fingerprint} and width {manifest.width}, its "
            f"teacher gives {teacher.fingerprint} and {teacher.width}; {REDO}"
        )
