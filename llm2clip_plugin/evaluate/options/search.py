"""The options of ``llm2clip search``."""

from dataclasses import dataclass, field

from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.options.command import Command
from llm2clip_plugin.text.settings import EncoderConfig


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Images by text."""

    tower: str  # tower directory or Hub id, with a text adapter
    data: SourceConfig  # images, with or without captions; also a folder of image files
    text: tuple[str, ...] = ()  # texts to search for, in any language
    top_k: int = 10  # images of each text
    output: str = "search.html"  # the page to write; "": none
    json: str = ""  # write keys and scores here
    cache: str = ""  # folder of the embedded images and texts; "": TOWER-search, next to the tower
    teacher: EncoderConfig = field(default_factory=EncoderConfig)  # the LLM, if not where the card says
    batch: int = 64  # images in one call of the tower
    workers: int = 0  # processes that decode images
    device: str = ""  # cpu, cuda, cuda:1 ...; "": the accelerator, if there is one

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError('no text to search for; usage: llm2clip search TOWER DATA "a bird on a wire"')
        if blank := [number for number, text in enumerate(self.text, 1) if not text.strip()]:
            raise ValueError(f"text {blank[0]} of {len(self.text)} is blank")
        if self.top_k < 1 or self.batch < 1:
            raise ValueError(f"top-k is {self.top_k} and batch-size {self.batch}, expected at least 1")


COMMAND = Command(
    name="search",
    example='llm2clip search towers/l14-336 /data/photos "a bird on a wire" "ein Vogel" --output birds.html',
    about="Find the images that are nearest to each text, with the tower's teacher. DATA is captioned data of any "
    "format, whose captions are not used, or a folder of image files. Images and texts are embedded once; rerun the "
    "same command to resume.",
    settings=SearchConfig,
    arguments="tower data.path text",
    everyday="top-k output json cache image-folder llm adapter batch-size workers device",
    hidden="data.weight data.shuffle_window data.kinds data.languages",
)
