"""The options of ``llm2clip evaluate``."""

from dataclasses import dataclass, field

from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.options.command import Command


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Retrieval recall of a tower."""

    tower: str  # tower directory or Hub id, with a text adapter
    data: SourceConfig
    cache: str = ""  # the teacher's embeddings of the captions; "": embeddings-<fingerprint> in the data's folder
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    any_teacher: bool = False  # accept a cache from a different teacher than the tower's
    device: str = ""  # cpu, cuda, cuda:1 ...; "": the accelerator, if there is one
    resamples: int = 2000  # bootstrap resamples of the intervals; 0: no intervals
    json: str = ""  # file to write: the metrics and every query's hits, for llm2clip compare


COMMAND = Command(
    name="evaluate",
    example="llm2clip evaluate runs/l14-336/tower /data/flickr30k.jsonl --image-folder /data/flickr30k-images",
    about="Measure a tower's image-text retrieval recall on data whose captions are cached. Under torchrun or the "
    "deepspeed launcher the ranks split the work. With --suite NAMES: benchmarks by name (flickr30k, coco, docci, "
    "sugarcrepe ...), see llm2clip evaluate --suite all --help.",
    settings=EvaluateConfig,
    arguments="tower data.path",
    everyday="cache image-folder fields kinds languages group limit batch-size output device",
    shown={"json": "output"},
    hidden="data.weight data.shuffle_window data.kinds data.languages",
    extras={"suite": "benchmarks by name; see `llm2clip evaluate --suite all --help`"},
)
