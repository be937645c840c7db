"""EmbedConfig: the captions, the LLM and the cache of ``llm2clip embed``."""

from dataclasses import dataclass

from llm2clip_plugin.contracts import CACHE_DTYPES
from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.options import Command, unknown
from llm2clip_plugin.text.config import EncoderConfig


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """One pass of a data set's captions through a frozen LLM (stage 1.5)."""

    source: SourceConfig  # the captioned images
    encoder: EncoderConfig  # the LLM
    cache: str = ""  # folder of the cache; "": embeddings-<fingerprint> in the data's folder
    dtype: str = "float16"  # storage: float16, or int8 with a scale for each row (half the size)
    tokens_per_batch: int = 0  # tokens of a batch, padding included; 0: chosen by device
    dry_run: bool = False  # print the number of captions and the size of the cache, then exit
    overwrite: bool = False  # replace cached captions that the data, as it is read now, does not have
    verify: bool = False  # write nothing: read the full cache, compare it with the data, embed a sample again

    def __post_init__(self) -> None:
        if self.dtype not in CACHE_DTYPES:
            raise ValueError(unknown("cache dtype", self.dtype, CACHE_DTYPES))
        if self.tokens_per_batch < 0:
            raise ValueError(f"tokens_per_batch {self.tokens_per_batch} must not be negative")


# The options of ``llm2clip embed``.

COMMAND = Command(
    name="embed",
    example="llm2clip embed /data/cc3m --llm meta-llama/Llama-3.2-1B-Instruct --adapter runs/llm/adapter",
    about="Stage 1.5: embed the captions of DATA with a frozen LLM and cache the embeddings. Rerun the same command to "
    "resume; shards that are complete are skipped.",
    settings=EmbedConfig,
    arguments="source.path",
    everyday="llm adapter preset cache fields image-folder dtype load-in-4bit overwrite verify dry-run",
    hidden="source.weight source.shuffle_window source.kinds source.languages",
)
