"""SHA-256 of files, weights and settings."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.safetensors_header import read_header


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
            digest.update(
                canonical_json([name, entry.dtype, list(entry.shape)]).encode()
            )
            file.seek(header.data_start + entry.start)
            remaining = entry.stop - entry.start
            while remaining:
                block = file.read(min(remaining, 1 << 22))
                if not block:
                    raise ContractError(
                        f"{path} ends inside {name}; copy or export it again"
                    )
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
