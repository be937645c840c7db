"""What to do about a cache's file that is damaged or missing: the command that made the cache, as it was typed."""

from pathlib import Path

from llm2clip_plugin.contracts import ContractError, EmbedRecord
from llm2clip_plugin.run_files import again


def embed_command(path: Path) -> str:
    """The ``llm2clip embed`` command that made the cache that holds ``path``; without arguments if none is recorded."""
    for folder in (path, *path.parents):
        if (folder / EmbedRecord.FILE).is_file():
            try:
                return again(EmbedRecord.read(folder / EmbedRecord.FILE).command) or "llm2clip embed"
            except (ContractError, OSError):
                break
    return "llm2clip embed"


def redo(path: Path) -> str:
    """``rerun `...`; complete shards are skipped``, for the cache that holds ``path``."""
    return f"rerun `{embed_command(path)}`; complete shards are skipped"


def repair(path: Path) -> str:
    """``rerun `...`, which embeds damaged shards again``, for the cache that holds ``path``."""
    return f"rerun `{embed_command(path)}`, which embeds damaged shards again"
