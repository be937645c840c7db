"""Versioned JSON records: written atomically, and checked field by field when they are read."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from llm2clip_plugin.contracts.writing import atomic_file
from llm2clip_plugin.outside.values import ContractError, from_plain, read_json_value

Record = TypeVar("Record", bound="VersionedRecord")
HEAD = ("kind", "format_version")


@dataclass(frozen=True, kw_only=True)
class VersionedRecord:
    """A dataclass stored as JSON with its kind and format version; reading rejects any other."""

    KIND: ClassVar[str] = ""
    VERSION: ClassVar[int] = 1

    def to_json(self) -> str:
        """The record as indented JSON."""
        body = {"kind": self.KIND, "format_version": self.VERSION, **dataclasses.asdict(self)}
        return json.dumps(body, indent=2, ensure_ascii=False) + "\n"

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the record atomically to ``path`` and return the path."""
        with atomic_file(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")
        return Path(path)

    @classmethod
    def read(cls: type[Record], path: str | os.PathLike[str]) -> Record:
        """Read a record; raises FileNotFoundError, or ContractError naming the file and the field."""
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no {cls.KIND} at {path}")
        return cls.from_dict(read_json_value(path), where=str(path))

    @classmethod
    def from_dict(cls: type[Record], body: Any, *, where: str) -> Record:
        """Build a record from parsed JSON; ``where`` is named in errors."""
        if not isinstance(body, dict) or body.get("kind") != cls.KIND:
            kind = body.get("kind") if isinstance(body, dict) else type(body).__name__
            raise ContractError(f"{where} contains a {kind!r}, expected a {cls.KIND!r}")
        if body.get("format_version") != cls.VERSION:
            raise ContractError(
                f"{where} has format version {body.get('format_version')}, but this release reads {cls.VERSION}; "
                "create the file again with this release, or install the release that wrote it"
            )
        record = from_plain(cls, {name: value for name, value in body.items() if name not in HEAD}, where=where)
        record.check_values(where=where)
        return record

    def check_values(self, *, where: str) -> None:
        """Raise ContractError for a value that no reader can use; the types of all fields are right already."""
