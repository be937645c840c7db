"""The options of ``llm2clip evaluate captions``."""

from dataclasses import dataclass, field

from llm2clip_plugin.evaluate.config import CaptionSetConfig, ReadingConfig
from llm2clip_plugin.options.command import Command
from llm2clip_plugin.text.settings import EncoderConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateCaptionsConfig:
    """Caption retrieval accuracy of an LLM."""

    measure: CaptionSetConfig = field(default_factory=CaptionSetConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    search: bool = False  # try ways of reading the LLM on DATA, validation captions, and print the best
    reading: ReadingConfig = field(default_factory=ReadingConfig)
    json: str = ""  # file to write: the metrics and every caption's hit, for llm2clip compare


COMMAND = Command(
    name="evaluate captions",
    example="llm2clip evaluate captions /data/flickr30k --llm meta-llama/Llama-3.2-1B --adapter runs/llm/adapter",
    about="Measure the caption retrieval accuracy of an LLM, fine-tuned or not: one caption of an image retrieves "
    "another, within and across languages. Images are not read.",
    settings=EvaluateCaptionsConfig,
    arguments="measure.captions",
    everyday="llm adapter preset retrieve home across across-kind limit search fit-on folder output",
    shown={"measure.captions": "data", "json": "output"},
)
