"""Versioned JSON records with a checksum: written atomically, and checked field by field when they are read."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from llm2clip_plugin.contracts.hashes import canonical_json, sha256_text
from llm2clip_plugin.contracts.writing import atomic_file
from llm2clip_plugin.outside.values import ContractError, check_fields, read_json_value

Record = TypeVar("Record", bound="VersionedRecord")
SEAL = "record_sha256"
HEAD = ("kind", "format_version")


def rename_keys(body: dict[str, Any], names: dict[str, str], path: str = "") -> dict[str, Any]:
    """``body`` with renamed keys, nested ones by dotted names: ``{"dual.joint_width": "dual.projection_dim"}``.

    Raises ContractError if ``body`` has a key under its old and its new name.
    """
    out: dict[str, Any] = {}
    for key, value in body.items():
        new = names.get(f"{path}{key}", f"{path}{key}").removeprefix(path)
        if new in out or (new != key and new in body):
            raise ContractError(f"{path}{key} and {path}{new} are the same setting; delete one of them")
        out[new] = rename_keys(value, names, f"{path}{key}.") if isinstance(value, dict) else value
    return out


@dataclass(frozen=True, kw_only=True)
class VersionedRecord:
    """A dataclass stored as JSON with its kind and format version; reading rejects any other."""

    KIND: ClassVar[str] = ""
    VERSION: ClassVar[int] = 1
    KEYS: ClassVar[dict[str, str]] = {}  # field -> its key in the file, where they differ; a reader accepts both
    # an object of the file that also holds the record's checksum: version 0.1 accepts any key there, but no other field
    SEALED_IN: ClassVar[str] = ""

    def to_json(self) -> str:
        """The record as indented JSON, with its checksum."""
        body = {"kind": self.KIND, "format_version": self.VERSION, **rename_keys(dataclasses.asdict(self), self.KEYS)}
        if self.SEALED_IN:
            body[self.SEALED_IN] = {**body[self.SEALED_IN], SEAL: _checksum(body)}
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
        values = {name: value for name, value in unsealed(cls, body, where).items() if name not in HEAD}
        try:
            values = rename_keys(values, {key: field_name for field_name, key in cls.KEYS.items()})
        except ContractError as error:
            raise ContractError(f"{where}: {error}") from error
        known = {item.name: item for item in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(known)):
            raise ContractError(f"{where} has unknown fields {unknown}; known: {sorted(known)}")
        required = {name for name, item in known.items() if item.default is item.default_factory is dataclasses.MISSING}
        if missing := sorted(required - set(values)):
            raise ContractError(f"{where} is missing the required fields {missing}")
        check_fields(cls, values, where=where, renamed=cls.KEYS)
        record = cls(**values)
        record.check_values(where=where)
        return record

    def check_values(self, *, where: str) -> None:
        """Raise ContractError for a value that no reader can use; the types of all fields are right already."""


def unsealed(record: type[VersionedRecord], body: dict[str, Any], where: str) -> dict[str, Any]:
    """A record's JSON without its checksum, after comparing it; ContractError if a field was changed.

    Version 0.1 and other programs write none.
    """
    holder = body.get(record.SEALED_IN)
    if not isinstance(holder, dict) or SEAL not in holder:
        return body
    rest = {**body, record.SEALED_IN: {key: value for key, value in holder.items() if key != SEAL}}
    if (actual := _checksum(rest)) != holder[SEAL]:
        raise ContractError(
            f"{where} was changed after it was written: its checksum is {actual[:12]}..., {record.SEALED_IN}.{SEAL} "
            f"says {str(holder[SEAL])[:12]}...; write it again, or, if the change is intended, delete {SEAL!r} in it"
        )
    return rest


def _checksum(body: dict[str, Any]) -> str:
    return sha256_text(canonical_json(json.loads(json.dumps(body))))
