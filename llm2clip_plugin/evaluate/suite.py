"""What a retrieval suite is: which files, how they are read, what is measured, what the paper reports."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llm2clip_plugin.evaluate.in_memory_source import InMemorySource, Row
from llm2clip_plugin.evaluate.suite_measures import Measure, recall


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One benchmark. ``paper``: R@1 image->text and text->image in percent, single runs without intervals."""

    name: str  # of the suite and of its folder below the root
    title: str
    requires: Mapping[str, str]  # path in the suite's folder, or alternatives separated by "|" -> where to get it
    read: Callable[[Path], list[Row]]  # the suite's folder -> its images and captions
    measure: Measure = recall  # recall | recall_by_language | hard_negatives
    images: int = 0  # of the published test set, any other number is reported; 0: don't check
    table: str = ""  # title of the table that the suite is a column of, recall only; "": none
    paper: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # row of that table -> (i2t, t2i)
    paper_source: Literal["review", "site"] = "review"  # public review of versions 1 and 2 | authors' project page
    order: int = 100  # position in lists and tables

    def missing(self, root: Path) -> list[str]:
        """One line for each file or folder that does not exist: its path and where to get it."""
        lines = []
        for names, origin in self.requires.items():
            paths = [root / self.name / name for name in names.split("|")]
            if not any(path.exists() for path in paths):
                lines.append(f"{self.title}: {' or '.join(map(str, paths))} not found; get it from {origin}")
        return lines

    def open(self, root: Path) -> InMemorySource:
        """The suite as a data source. Raises FileNotFoundError that lists every missing file."""
        if lines := self.missing(root):
            raise FileNotFoundError("\n".join(lines))
        return InMemorySource(self.name, root / self.name, self.read(root / self.name))
