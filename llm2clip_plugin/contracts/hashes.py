"""Hashes of texts, files and weights, and the JSON text that is hashed."""

import hashlib
import json
import os
from typing import Any

from llm2clip_plugin.outside.safetensors_header import read_header
from llm2clip_plugin.outside.values import ContractError


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
    """SHA-256 over the tensors of a safetensors file: name, dtype, shape, bytes, in order of name.

    It does not depend on the order of tensors in the file or on its metadata, so saving the same weights again with
    another version of a library keeps the hash.

    Raises ContractError if the file is not safetensors or is truncated.
    """
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
