"""The retrieval benchmarks by name, read from files that users download themselves.

A file defines ``SUITE``, a suite or a list of them; a new file in this folder adds its own (`llm2clip_plugin.files`).
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.samples import Caption
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.evaluate.opening import InMemorySource, Row
from llm2clip_plugin.evaluate.retrieval import ALL, EmbeddedPairs, report_retrieval
from llm2clip_plugin.files import discover
from llm2clip_plugin.files import read_json_value as read_json  # noqa: F401 - for the suites
from llm2clip_plugin.options import unknown

# metrics (fractions) and the score of every query, by the arguments of `report_retrieval`
Measure = Callable[..., ScoreFile]


def recall(pairs: EmbeddedPairs, config: RetrievalConfig, **options: Any) -> ScoreFile:
    """Recall@k in both directions over all captions."""
    return report_retrieval(pairs, config, **options).scores()


def recall_by_language(pairs: EmbeddedPairs, config: RetrievalConfig, **options: Any) -> ScoreFile:
    """The mean of the languages' recalls, each over its own captions; recall over all captions is ``all/...``."""
    scores = recall(pairs, config, **options)
    parts = sorted({key.split("/")[0] for key in scores.metrics if "/" in key} - {"shuffled", "chance"})
    if not parts:
        return scores
    metrics = dict(scores.metrics)
    for name in [key for key in scores.metrics if "/" not in key]:
        metrics[f"{ALL}/{name}"] = scores.metrics[name]
        metrics[name] = sum(scores.metrics[f"{part}/{name}"] for part in parts) / len(parts)
    notes = [*scores.notes, f"headline: mean over {len(parts)} languages"]
    return dataclasses.replace(scores, metrics=metrics, notes=notes)


def hard_negatives(pairs: EmbeddedPairs, config: RetrievalConfig | None = None, **options: Any) -> ScoreFile:
    """Captions of kind ``GROUP/ID/right`` against ``GROUP/ID/wrong`` of the same image; a tie counts one half.

    Metrics: one for each group, and ``mean``, the unweighted mean of the groups; chance is 0.5.
    Source: Hsieh et al., SugarCrepe (2023), section 4.
    """
    score_M = (pairs.image_ND[pairs.owner_M].double() * pairs.text_MD.double()).sum(1)
    place = {caption.kind: position for position, caption in enumerate(pairs.captions)}
    items, groups = [], defaultdict(list)
    for kind, right in place.items():
        item, _, side = kind.rpartition("/")
        if side == "right":
            gap, group = float(score_M[right] - score_M[place[f"{item}/wrong"]]), item.split("/")[0]
            hit = 0.5 if gap == 0 else float(gap > 0)
            groups[group].append(hit)
            items.append({"id": item, "score": hit, "cluster": pairs.keys[int(pairs.owner_M[right])], "part": group})
    metrics = {group: sum(hits) / len(hits) for group, hits in groups.items()}
    return ScoreFile(
        benchmark="",
        metrics=metrics | {"mean": sum(metrics.values()) / len(metrics)},
        items=items,
        counts={"images": len(pairs.keys), "items": len(items), "left_out": len(pairs.broken)},
        notes=[f"left out: {error}" for error in pairs.broken],
    )


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One benchmark. ``paper``: R@1 image->text and text->image in percent, single runs without intervals."""

    name: str  # of the suite and of its folder below the root
    title: str
    requires: Mapping[str, str]  # path in the suite's folder, or alternatives separated by "|" -> where to get it
    read: Callable[[Path], list[Row]]  # the suite's folder -> its images and captions
    measure: Measure = recall  # recall | recall_by_language | hard_negatives
    choose: bool = True  # --kinds and --languages choose among its captions
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
        """The suite as a data source."""
        return InMemorySource(self.name, root / self.name, self.read(root / self.name))


def suites() -> dict[str, Suite]:
    """Every suite by name, in the order of the paper's tables; further ones follow by name."""
    members = discover(__name__, "SUITE").values()
    return {suite.name: suite for suite in sorted(members, key=lambda suite: (suite.order, suite.name))}


def select_suites(names: str) -> list[Suite]:
    """The suites of names separated by commas, ``paper`` and ``all`` among them. ValueError for an unknown one."""
    known = suites()
    groups = {"paper": [name for name, suite in known.items() if suite.paper], "all": list(known)}
    selected: dict[str, Suite] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in known and name not in groups:
            raise ValueError(unknown("suite", name, [*groups, *known]))
        selected |= {member: known[member] for member in groups.get(name, [name])}
    return list(selected.values())


# What several suites' readers share.


def to_captions(texts: Iterable[str], kind: str = "short", language: str = "en") -> tuple[Caption, ...]:
    """Captions with line breaks and repeated spaces collapsed; blank texts are dropped."""
    return tuple(Caption(" ".join(text.split()), kind, language) for text in texts if text.strip())


def first_existing(*folders: Path) -> Path:
    """The first of the folders that exists; the first one if none does."""
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def read_json_lines(path: Path) -> Iterator[Any]:
    """The objects of a JSON Lines file; ValueError names the file and the line."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from error


@contextmanager
def expected_layout(path: Path) -> Iterator[None]:
    """Turn a missing field within the block into a ValueError that names the file."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"unexpected layout of {path}: {error!r}") from error
