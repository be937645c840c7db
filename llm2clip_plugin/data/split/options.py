"""The options of ``llm2clip data split``."""

from __future__ import annotations

from dataclasses import dataclass

from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.options.command import Command


@dataclass(frozen=True, kw_only=True)
class SplitConfig(SourceConfig):
    """A split of one data set."""

    output: str  # folder to write: train and validation, tars copied or lists that refer to the same images
    validation: float = 0.02  # fraction of the keys, or of the field's values, that is held out
    by: str = ""  # field of the samples' JSON: samples with one value are on one side; "": each sample by its key
    workers: int = 0  # processes; 0: one per core
    dry_run: bool = False  # print the counts and write nothing

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.validation < 1:
            raise ValueError(f"validation is {self.validation:g}, expected a fraction between 0 and 1, such as 0.02")
        if not self.output:
            raise ValueError("no output folder is set; add --output DIR")


COMMAND = Command(
    name="data split",
    example="llm2clip data split /data/photos --output /data/photos-split --validation 0.02",
    about="Hold out a part of a data set for validation. A sample's side follows from its key, or from a field (--by), "
    "alone: the same in any order of shards. Rerun the same command to resume.",
    settings=SplitConfig,
    arguments="path",
    everyday="output validation by image-folder fields workers dry-run",
    hidden="weight shuffle_window kinds languages",
)
