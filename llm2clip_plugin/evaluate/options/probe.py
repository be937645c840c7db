"""The options of ``llm2clip evaluate probe``."""

from dataclasses import dataclass
from typing import Literal

from llm2clip_plugin.options.command import Command


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """kNN and linear probe on a tower's features."""

    tower: str  # tower directory, Hugging Face directory or Hub id
    train: str  # labeled images that the probes are fitted on
    test: str  # labeled images to classify
    label: str = ""  # field of the samples' JSON that is the class, for captioned data
    cluster: str = ""  # field of the samples' JSON; images with the same value are resampled and held out together
    # feature: the tower's own pooling, the CLS token, the mean of the patches, or the last two concatenated
    pool: Literal["pooled", "cls", "mean", "cls_mean"] = "pooled"
    k: int = 20  # neighbors that vote
    temperature: float = 0.07  # a neighbor's vote is exp(cosine similarity / temperature)
    linear: bool = True  # also fit the linear probe
    batch: int = 64  # images in one call of the tower
    workers: int = 0  # processes that decode images
    device: str = ""  # cpu, cuda, cuda:1 ...; "": the accelerator, if there is one
    json: str = ""  # write the metrics and every test image's hits here (a score file)


COMMAND = Command(
    name="evaluate probe",
    example="llm2clip evaluate probe towers/l14-336 /data/imagenet/train /data/imagenet/val",
    about="Measure a tower's features by kNN and a linear probe. TOWER is anything that load_tower opens, so a tower "
    "can be compared with the one that it was trained from. TRAIN and TEST have one folder per class, or tars with "
    ".cls members; with --label FIELD they are captioned data, and the field is the class.",
    settings=ProbeConfig,
    arguments="tower train test",
    shown={"json": "output"},
)
