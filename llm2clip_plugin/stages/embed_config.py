"""The settings and options of ``llm2clip embed``. Read without torch."""

from dataclasses import dataclass
from typing import Literal

from llm2clip_plugin.data.sources import SourceConfig
from llm2clip_plugin.options import Command, section, setting
from llm2clip_plugin.text.config import EncoderConfig


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """One pass of a data set's captions through a frozen LLM (stage 1.5)."""

    # the captioned images
    source: SourceConfig = section(
        hidden=("weight", "shuffle_window", "kinds", "languages")
    )
    encoder: EncoderConfig  # the LLM
    cache: str = setting(
        "",
        help='folder of the cache; "": embeddings-<fingerprint> in the data\'s folder',
    )
    dtype: Literal["float16", "int8"] = setting(
        "float16",
        help="storage; int8: with a scale for each row, half the size",
    )
    tokens_per_batch: int = setting(
        0,
        help="tokens of a batch, padding included; 0: chosen by device",
        unit="tokens",
    )
    torch_compile: bool = setting(
        False,
        help="torch.compile the LLM's blocks; the first batches wait for it, up to a minute",
    )
    dry_run: bool = setting(
        False,
        help="print the number of captions and the size of the cache, then exit",
    )
    overwrite: bool = setting(
        False,
        help="replace cached captions that the data, as it is read now, does not have",
    )
    verify: bool = setting(
        False,
        help="write nothing: read the full cache, compare it with the data, embed a sample again",
    )


EMBED = Command(
    name="embed",
    example="llm2clip embed /data/cc3m --llm meta-llama/Llama-3.2-1B-Instruct "
    "--adapter runs/llm/adapter",
    about="Stage 1.5: embed the captions of DATA with a frozen LLM and cache the embeddings. Rerun "
    "the same command to resume; shards that are complete are skipped.",
    settings=EmbedConfig,
    arguments="source.path",
    everyday="llm adapter preset cache fields image-folder dtype load-in-4bit overwrite verify "
    "dry-run",
)
