"""What a retrieval suite is: which files, how they are read, what is measured, what the paper reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llm2clip_plugin.evaluate.in_memory_source import InMemorySource, Row
from llm2clip_plugin.evaluate.suite_measures import Measure, recall


@dataclass(frozen=True, kw_only=True)
class RequiredFile:
    """A file or folder of a suite."""

    names: tuple[str, ...]  # paths relative to the suite's folder; one of them must exist
    get: str  # where to get it


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One benchmark. ``paper`` holds single runs without intervals: R@1 image->text and text->image, percent."""

    name: str  # of the suite and of its folder below the root
    title: str
    requires: tuple[RequiredFile, ...]
    read: Callable[[Path], list[Row]]  # the suite's folder -> its images and captions
    measure: Measure = recall  # recall | recall_by_language | hard_negatives
    images: int = 0  # of the published test set, any other number is reported; 0: don't check
    table: str = ""  # title of the table that the suite is a column of, recall only; "": none
    paper: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # row of that table -> (i2t, t2i)
    paper_source: Literal["review", "site"] = "review"  # public review of versions 1 and 2 | authors' project page
    order: int = 100  # position in lists and tables

    def missing(self, root: Path) -> list[str]:
        """One line for each file or folder that does not exist: its path and where to get it."""
        folder = root / self.name
        return [
            f"{self.title}: {' or '.join(str(folder / name) for name in file.names)} not found; get it from {file.get}"
            for file in self.requires
            if not any((folder / name).exists() for name in file.names)
        ]

    def open(self, root: Path) -> InMemorySource:
        """The suite as a data source. Raises FileNotFoundError that lists every missing file."""
        if lines := self.missing(root):
            raise FileNotFoundError("\n".join(lines))
        return InMemorySource(self.name, root / self.name, self.read(root / self.name))
