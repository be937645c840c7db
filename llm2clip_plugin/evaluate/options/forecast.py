"""The options of ``llm2clip forecast``."""

from dataclasses import dataclass, field
from pathlib import Path

import llm2clip_plugin
from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.options.command import Command
from llm2clip_plugin.text.settings import EncoderConfig

DRAWINGS = Path(llm2clip_plugin.__file__).parent / "data" / "emoji" / "validation-noto.tar"


@dataclass(frozen=True, kw_only=True)
class ForecastConfig:
    """How well towers are likely to serve an LLM in LLaVA."""

    towers: tuple[str, ...]  # tower directories, Hugging Face directories or Hub ids; differences are to the first
    data: SourceConfig = field(default_factory=lambda: SourceConfig(path=str(DRAWINGS)))
    encoder: EncoderConfig = field(  # as LLaVA runs it; the state of <s> would drown the captions
        default_factory=lambda: EncoderConfig(attention="causal", layer=-2, include_bos=False)
    )
    cache: str = ""  # folder of the captions' embeddings; "": embeddings-<fingerprint> in the data's folder
    cluster: str = ""  # field of the samples' JSON; images with the same value are resampled and held out together
    select_layer: int = -2  # hidden state of the tower whose patches are read, LLaVA's mm_vision_select_layer
    limit: int = 1000  # images, evenly spaced, at most
    batch: int = 64  # images in one call of a tower
    device: str = ""  # cpu, cuda, cuda:1 ...; "": the accelerator, if there is one
    json: str = ""  # write each tower's measures and every image's values here (score files, for llm2clip compare)

    def __post_init__(self) -> None:
        if not self.towers:
            raise ValueError(f"no tower given; for example: {EXAMPLE}")
        if not self.encoder.llm:
            raise ValueError(f"no LLM given; for example: {EXAMPLE}")


EXAMPLE = "llm2clip forecast towers/clip-l14 runs/l14/tower --llm lmsys/vicuna-7b-v1.5 --data /data/lcs-558k.json"

COMMAND = Command(
    name="forecast",
    example=EXAMPLE,
    about="Before any LLaVA is trained: how well do a tower's patches agree with what an LLM makes of the images' "
    "captions? Mutual neighbors (RAVEL), CKA and a linear probe, with intervals; of two or more towers the paired "
    "differences to the first. Without --data: the package's 200 validation drawings.",
    settings=ForecastConfig,
    arguments="towers",
    everyday="llm data image-folder kinds languages cache cluster select-layer limit output device",
    shown={"json": "output"},
    hidden="data.weight data.shuffle_window",
)
