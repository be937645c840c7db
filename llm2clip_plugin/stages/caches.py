"""The embedding caches next to data: those of LLMs, and those of the text towers of CLIPs."""

from pathlib import Path

from llm2clip_plugin.contracts import PROJECTED, CacheManifest, TeacherIdentity
from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.data.sources.shards import data_folder
from llm2clip_plugin.outside.values import read_json_value
from llm2clip_plugin.text.teacher import embed_command


def caches_next_to(folder: Path, *, of_clip: bool) -> list[str]:
    """The ``embeddings-*`` folders in the folder of the data: those of LLMs, or those of the text towers of CLIPs."""
    found = []
    for path in sorted(folder.glob(f"embeddings-*/{CacheManifest.FILE}")):
        body = read_json_value(path)
        teacher = body.get("teacher") if isinstance(body, dict) else None
        if (isinstance(teacher, dict) and teacher.get("pooling") == PROJECTED) is of_clip:
            found.append(str(path.parent))
    return found


def find_cache(source: SourceConfig, teacher: TeacherIdentity | None = None, *, of_clip: bool = False) -> str:
    """The only ``embeddings-*`` folder of an LLM, or of a CLIP's text tower, next to the data.

    ``teacher``: for the message, if it is known. Raises FileNotFoundError if there is none, ValueError if there are
    several.
    """
    folder = data_folder(source.path)
    caches = caches_next_to(folder, of_clip=of_clip)
    option, kind = ("--clip-cache", "of a CLIP's text features") if of_clip else ("--cache", "of an LLM")
    if not caches:
        create = embed_command(source.path, None if of_clip else teacher)
        raise FileNotFoundError(f"no embedding cache {kind} (embeddings-*) in {folder}; create it: {create}")
    if len(caches) > 1:
        raise ValueError(f"{folder} contains the caches {', '.join(caches)} {kind}; choose one with {option}")
    return caches[0]
