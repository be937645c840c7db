"""Write an embedding cache, from any number of ranks; ``reader`` lists what its files hold."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from llm2clip_plugin.contracts import (
    CacheManifest,
    ContractError,
    TeacherIdentity,
    atomic_file,
    canonical_json,
)
from llm2clip_plugin.data.cache.dtypes import CACHE_DTYPES
from llm2clip_plugin.data.cache.names import shard_file
from llm2clip_plugin.data.cache.reader import differences
from llm2clip_plugin.data.cache.rows import rows_digest
from llm2clip_plugin.data.cache.shard_file import META, ShardFile, row_check, tensors_digest
from llm2clip_plugin.options.names import unknown
from llm2clip_plugin.run_files import PROGRESS, tell_job

log = logging.getLogger(__name__)

NAMED = 3  # samples whose image has changed that are named
INT8_COSINE = 0.999  # lowest cosine similarity allowed between a row and its int8 form
FLOAT16_SAFE = 32768.0  # larger rows are stored halved until they fit (float16 ends at 65504)


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
        if dtype not in CACHE_DTYPES:
            raise ValueError(unknown("cache dtype", dtype, CACHE_DTYPES))
        self.directory = Path(directory)
        self.identity = identity
        self.dtype = dtype
        self._written: list[str] = []
        path = self.directory / CacheManifest.FILE
        if not path.is_file():
            self._manifest({}, complete=False).write(path)
            return
        existing = self.manifest()
        if existing.fingerprint != identity.fingerprint:
            raise ContractError(
                f"{path} belongs to another teacher ({differences(existing.teacher, identity)}; fingerprint "
                f"{existing.fingerprint[:12]}, not {identity.fingerprint[:12]}); choose another --cache"
            )
        if existing.dtype != dtype:
            raise ContractError(
                f"{path} has dtype {existing.dtype}, not {dtype}; choose another --cache, or use --dtype "
                f"{existing.dtype}"
            )

    def manifest(self) -> CacheManifest:
        """The directory's, as it is now."""
        return CacheManifest.read(self.directory / CacheManifest.FILE)

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

    def is_complete(self, shard: str, digest: str, image_checks: Sequence[int] | None = None) -> bool:
        """Whether the shard's file exists, is intact, and has this teacher and the rows of this digest.

        image_checks: of the samples' images now; None: they are not compared. Reads every byte, and logs a warning if
        the file is damaged or an image has changed.
        """
        path = self.path(shard)
        try:
            file = ShardFile(path)
        except FileNotFoundError:
            return False
        except ContractError as error:
            log.warning("%s", error)
            return False
        found = (file.meta["fingerprint"], file.meta["dtype"], file.meta["rows_sha256"])
        if found != (self.identity.fingerprint, self.dtype, digest):
            return False
        if damage := file.damage():
            log.warning("%s is damaged: %s; its captions are embedded again", path, damage)
            return False
        if changed := file.changed_images(image_checks or ()):
            names = ", ".join(map(file.key, changed[:NAMED])) + ", ..." * (len(changed) > NAMED)
            log.warning("%s: %d images have changed (%s); its captions are embedded again", path, len(changed), names)
        return not changed

    def refuse_loss(self, shard: str, rows: Sequence[tuple[int, int]], read: str) -> None:
        """ContractError if the shard's file has more captions than ``rows``, or none of them; ``read``: from where.

        A damaged file may be replaced by anything.
        """
        try:
            file = ShardFile(self.path(shard))
            cached = set(file["caption_hashes"].tolist())
        except (FileNotFoundError, ContractError):
            return
        common = len(cached.intersection(value for _, value in rows))
        if len(rows) < file.captions or (cached and not common):
            raise ContractError(
                f"{file.path} has {file.captions} captions; {read} gives {len(rows)} for shard {shard!r}, {common} of "
                "them the same. Correct --fields or the data, choose another --cache, or replace them with --overwrite"
            )

    def write_shard(
        self,
        shard: str,
        keys: Sequence[str],
        rows: Sequence[tuple[int, int]],
        embeddings: torch.Tensor,
        *,
        truncated: int = 0,
        image_checks: Sequence[int] | None = None,
    ) -> None:
        """Write one shard; its file appears only when complete.

        shard: name, as the source gives it; keys: of its N samples; rows: R pairs (sample index, caption hash) in order
        of sample; embeddings: (R, W) float; truncated: captions that were longer than the teacher's maximum;
        image_checks: of the samples' images (shard_file.image_check), 0 for one that can't be read.
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
        self._refuse_inaccurate(shard, embeddings, stored)
        encoded, values = [key.encode() for key in keys], stored.numpy()
        tensors = {
            "embeddings": values,
            "scales": scales.numpy(),
            "row_starts": np.searchsorted(indices, np.arange(len(keys) + 1)).astype(np.int64),
            "caption_hashes": np.array([value for _, value in rows], dtype=np.int64),
            "keys": np.frombuffer(b"".join(encoded), dtype=np.uint8),
            "key_starts": np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        }
        scaled_rows = enumerate(zip(values, scales.tolist(), strict=True))
        row_checks = [row_check(row, scale, number) for number, (row, scale) in scaled_rows]
        checks = {"row_checks": np.array(row_checks, dtype=np.int64)}
        if image_checks is not None:
            checks["image_checks"] = np.array(image_checks, dtype=np.int64)
        metadata = {  # as one entry: safetensors writes entries in random order
            "shard": shard,
            "fingerprint": self.identity.fingerprint,
            "dtype": self.dtype,
            "rows_sha256": rows_digest(keys, rows),
            "sha256": tensors_digest(tensors),
            "checks_sha256": tensors_digest(checks),
            "truncated": str(truncated),
        }
        with atomic_file(self.path(shard)) as temporary:
            save_file(tensors | checks, str(temporary), metadata={META: canonical_json(metadata)})
        self._written.append(shard)
        tell_job(PROGRESS)

    def _refuse_inaccurate(self, shard: str, embeddings: torch.Tensor, stored: torch.Tensor) -> None:
        """ContractError for int8 where a few huge dimensions would round the others away."""
        if self.dtype != "int8" or not len(embeddings):
            return
        cosine = torch.nn.functional.cosine_similarity(embeddings, stored.float(), dim=1)
        cosine = cosine[embeddings.abs().amax(dim=1) > 0]
        if len(cosine) and float(cosine.min()) < INT8_COSINE:
            raise ContractError(
                f"shard {shard}: the cosine similarity of an embedding and its int8 form is {float(cosine.min()):.5f}, "
                f"lower than {INT8_COSINE}; use --dtype float16"
            )

    def finish(self, shards: Sequence[str] | None = None) -> CacheManifest | None:
        """Write and return the complete manifest if every shard exists; None while other ranks still write.

        shards: the names that must exist; by default those that this writer wrote. Shards that the manifest listed
        before stay in it, so the splits of a data set can share a directory.
        """
        path = self.directory / CacheManifest.FILE
        entries: dict[str, dict[str, object]] = {
            name: entry for name, entry in self.manifest().shards.items() if self.path(name).is_file()
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
                "bytes": file.size,
            }
        manifest = self._manifest(entries, complete=True)
        manifest.write(path)
        return manifest
