"""The options of ``llm2clip data make``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm2clip_plugin.data.sources.captions import DEFAULT_FIELDS, parse_fields
from llm2clip_plugin.options.command import Command

COLORS = ("", "white", "gray", "black")


@dataclass(frozen=True, kw_only=True)
class MakeConfig:
    """What WebDataset tars are made of."""

    path: str  # folder of pictures with a .txt or .json of the same name, or a .csv, .tsv, .jsonl or .parquet
    output: str  # folder to write; it appears when it is complete
    images: str = ""  # folder that a table's image paths start from; "": the table's own
    image_field: str = ""  # column of the image's path; "": image, file_name, path and the like
    # columns, or fields of a picture's .json, that are captions: NAME=KIND or NAME=KIND:LANGUAGE; txt is the .txt
    fields: tuple[str, ...] = (*DEFAULT_FIELDS, "text=short", "title=short")
    language: str = "en"  # of captions without a language
    file_names: bool = False  # a picture without a caption gets its file name as one: red-fox_2.jpg, "red fox"
    background: str = ""  # white | gray | black: put transparent pictures on it; "": left as they are
    shard_mb: int = 256  # size of a tar, 10^6 bytes
    show: int = 5  # how many of the pictures that are left out to print for each reason; left-out.jsonl has all
    workers: int = 0  # processes; 0: one per core
    overwrite: bool = False  # replace the output folder

    def __post_init__(self) -> None:
        parse_fields(self.fields, self.language)
        if self.background not in COLORS:
            raise ValueError(f"background is {self.background!r}, expected white, gray or black")
        if self.shard_mb < 1:
            raise ValueError(f"shard_mb is {self.shard_mb}, expected at least 1")
        inside = Path(self.output).resolve()
        if Path(self.path).resolve().is_relative_to(inside) or (
            self.images and Path(self.images).resolve().is_relative_to(inside)
        ):
            raise ValueError(f"--output {self.output} contains the pictures; choose another folder")


COMMAND = Command(
    name="data make",
    example="llm2clip data make photos --output photos-tars",
    about="Write WebDataset tars, which all commands read, from a folder of pictures or a table. Rows with the same "
    "image are joined to one sample with several captions. Unreadable pictures, those without a caption and exact "
    "copies are left out and listed.",
    settings=MakeConfig,
    arguments="path",
    everyday="output image-folder image-field fields file-names background workers overwrite",
)
