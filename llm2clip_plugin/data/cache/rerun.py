"""What to do about a cache's file that is damaged or missing: the command that made the cache, as it was typed."""

from pathlib import Path

from llm2clip_plugin.contracts import ContractError, EmbedRecord
from llm2clip_plugin.run_files import again


def redo(path: Path) -> str:
    """``rerun `...`, which embeds what is missing or damaged``, for the cache that holds ``path``."""
    command = ""
    for folder in (path, *path.parents):
        if (folder / EmbedRecord.FILE).is_file():
            try:
                command = again(EmbedRecord.read(folder / EmbedRecord.FILE).command)
            except (ContractError, OSError):
                pass
            break
    return f"rerun `{command or 'llm2clip embed'}`, which embeds what is missing or damaged"
