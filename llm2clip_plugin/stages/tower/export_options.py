"""The options of ``llm2clip export``."""

from dataclasses import dataclass

from llm2clip_plugin.options.command import Command
from llm2clip_plugin.options.names import unknown
from llm2clip_plugin.vision.convert.formats import format_helps


@dataclass(frozen=True, kw_only=True)
class TowerExportConfig:
    """A run or a tower directory to export."""

    source: str  # folder of a training run, tower directory, or Hub id
    output: str  # directory to write
    format: str = "tower"  # tower: a tower directory; or another format
    with_adapter: bool = False  # copy the teacher LLM's adapter, so that the directory embeds texts with the base LLM
    checkpoint: str = ""  # a run's checkpoint to export; "": the newest
    ema: bool = False  # export a run's moving average instead of its weights
    push: str | None = None  # OWNER/NAME: also upload the tower directory to the Hub
    public: bool = False  # make the uploaded repository public
    overwrite: bool = False  # replace an existing directory

    def __post_init__(self) -> None:
        if self.format not in (known := ("tower", *format_helps())):
            raise ValueError(unknown("--format", self.format, known))


COMMAND = Command(
    name="export",
    example="llm2clip export runs/l14-336 --output towers/l14-336",
    about="Write a run as a tower directory, or a tower directory in another format: "
    + "; ".join(f"{name}: {text}" for name, text in format_helps().items())
    + ".",
    settings=TowerExportConfig,
    arguments="source",
)
