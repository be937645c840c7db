"""Where an embedding cache stands, from its files alone. Standard library only."""

from dataclasses import dataclass
from pathlib import Path

from llm2clip_plugin.contracts import CacheManifest, ContractError, EmbedRecord
from llm2clip_plugin.data.cache.names import shard_file
from llm2clip_plugin.run_files import again


@dataclass(frozen=True, kw_only=True)
class CacheStatus:
    """A cache as its folder shows it; what is damaged or missing is in ``problems``."""

    folder: str
    complete: bool  # every shard of the data has its file, and the manifest says so
    done: int  # shards with a file; a file appears when it is complete
    shards: int  # of the data that was embedded last; 0: unknown
    data: str  # "": unknown
    captions: int  # in the manifest; 0 until it is complete
    teacher: str  # name of the LLM; "": unknown
    width: int
    dtype: str
    last_change: float  # of the newest shard's file, seconds since the epoch; 0: none
    go_on: str  # the command; "" if the cache is complete, or nothing was recorded
    problems: list[str]


def cache_status(folder: Path) -> CacheStatus:
    """The status of a cache folder; nothing in it is an error."""
    problems: list[str] = []
    manifest = _read(CacheManifest, folder, problems)
    record = _read(EmbedRecord, folder, problems) if (folder / EmbedRecord.FILE).exists() else None
    listed = list(manifest.shards) if manifest else []
    names = record.shards if record else listed
    there = [file for file in (folder / shard_file(name) for name in {*names, *listed}) if file.is_file()]
    if lost := [name for name in listed if not (folder / shard_file(name)).is_file()]:
        problems.append(f"{len(lost)} shards of the manifest have no file, such as {lost[0]}")
    complete = manifest is not None and manifest.complete and set(names) <= set(listed) and not problems
    return CacheStatus(
        folder=str(folder),
        complete=complete,
        done=len(there),
        shards=len(names),
        data=record.data if record else "",
        captions=manifest.captions if manifest else 0,
        teacher=str(manifest.teacher.get("llm", "")) if manifest else "",
        width=manifest.width if manifest else 0,
        dtype=manifest.dtype if manifest else "",
        last_change=max((file.stat().st_mtime for file in there), default=0.0),
        go_on=again(record.command) if record and not complete else "",
        problems=problems,
    )


def _read(kind: type, folder: Path, problems: list[str]):
    try:
        return kind.read(folder / kind.FILE)
    except (ContractError, OSError) as error:
        problems.append(str(error))
        return None
