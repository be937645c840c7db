"""The files that stages exchange: versioned JSON records, hashes, and atomic writes.

Standard library only: this module is imported by the training environment, by LLaVA's environment
and by ``llm2clip --help``.

| record        | file                | written by             | read by                          |
|---------------|---------------------|------------------------|----------------------------------|
| TowerCard     | ``llm2clip.json``   | export, import         | load_tower, LLaVA integration    |
| EncoderCard   | ``llm2clip_encoder.json`` | finetune-llm     | embed, evaluate captions         |
| CacheManifest | ``manifest.json``   | embed                  | tower training, evaluation       |
| EmbedRecord   | ``embed.json``      | embed                  | status                           |
| RunRecord     | ``run.json``        | tower and LLM training | export, resume, status           |
| ScoreFile     | ``*.scores.json``   | score, bench-mllm      | compare                          |
"""

from llm2clip_plugin.contracts.cards import PROJECTED, EncoderCard, TeacherIdentity, TowerCard
from llm2clip_plugin.contracts.full_disk import DiskFullError, naming_full_disk, size_text
from llm2clip_plugin.contracts.hashes import canonical_json, sha256_file, sha256_text, sha256_weights
from llm2clip_plugin.contracts.record import VersionedRecord
from llm2clip_plugin.contracts.results import CacheManifest, EmbedRecord, RunRecord, ScoreFile
from llm2clip_plugin.contracts.writing import atomic_directory, atomic_file
from llm2clip_plugin.outside.values import ContractError

__all__ = [
    "PROJECTED",
    "CacheManifest",
    "ContractError",
    "DiskFullError",
    "EmbedRecord",
    "EncoderCard",
    "RunRecord",
    "ScoreFile",
    "TeacherIdentity",
    "TowerCard",
    "VersionedRecord",
    "atomic_directory",
    "atomic_file",
    "canonical_json",
    "naming_full_disk",
    "sha256_file",
    "sha256_text",
    "sha256_weights",
    "size_text",
]
