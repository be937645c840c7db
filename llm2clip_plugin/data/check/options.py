"""The options of ``llm2clip data check``."""

from dataclasses import dataclass

from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.options.command import Command


@dataclass(frozen=True, kw_only=True)
class CheckConfig(SourceConfig):
    """What to look for in a data set."""

    validation: str = ""  # another data set: how many of its pictures and captions are in this one, too
    tokenizer: str = ""  # folder or Hub id of the LLM's tokenizer, to count tokens; "": count words
    max_tokens: int = 512  # count captions longer than this, in tokens (or words); the teacher truncates them
    small_side: int = 32  # count images with a side shorter than this, in pixels
    max_broken: float = 0.01  # fraction of broken samples above which training stops
    show: int = 10  # how many broken samples, duplicate captions ... to list; --json lists all broken samples
    workers: int = 0  # processes; 0: one per core
    json: bool = False  # print one JSON object


COMMAND = Command(
    name="data check",
    example="llm2clip data check /data/cc3m --fields caption=short --tokenizer meta-llama/Llama-3.2-1B-Instruct",
    about="Read a data set once, decode every image, and report statistics and broken samples. The exit status is 1 if "
    "training on it would stop, else 0.",
    settings=CheckConfig,
    arguments="path",
    everyday="image-folder fields kinds languages validation tokenizer max-tokens max-broken show workers json",
    hidden="weight shuffle_window",
)
