"""The retrieval benchmarks by name, read from files that users download themselves.

A file defines ``SUITE``, a suite or a list of them; a new file in this folder adds its own
(`llm2clip_plugin.discovery`).
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.listing import HIDDEN
from llm2clip_plugin.data.samples import BrokenSample, Caption, Sample
from llm2clip_plugin.data.sources import Shard, Source, SourceConfig
from llm2clip_plugin.data.tables import PICTURES
from llm2clip_plugin.discovery import discover
from llm2clip_plugin.errors import errors_about
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.evaluate.features import EmbeddedPairs
from llm2clip_plugin.evaluate.retrieval import ALL, report_retrieval
from llm2clip_plugin.json_files import read_json_value as read_json  # noqa: F401 - for the suites
from llm2clip_plugin.options import unknown
from llm2clip_plugin.outside import MAX_IMAGE, read_regular

IMAGE_ENDINGS = tuple(suffix.removeprefix(".") for suffix in PICTURES)


@dataclass(frozen=True)
class Row:
    """One image and its captions."""

    key: str
    image: Path | Callable[[], bytes] | None  # None: captions only
    captions: tuple[Caption, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)


class InMemorySource(Source):
    """One shard of rows, called ``name``. Captions are kept as they are: a benchmark counts a
    duplicate twice."""

    def __init__(self, name: str, folder: Path, rows: Sequence[Row]) -> None:
        if not rows:
            raise ValueError(f"{name}: no images found in {folder}")
        self.rows = list(rows)
        super().__init__(SourceConfig(path=str(folder)), (Shard(name, len(rows), 0),))
        self.name = name

    def record(self, number: int) -> Sample:
        self.place(number)
        row = self.rows[number]
        return Sample(row.key, {}, row.meta, partial(self._read_image, row))

    def __getitem__(self, number: int) -> Sample:
        return replace(self.record(number), captions=self.rows[number].captions)

    def files(self) -> dict[str, str]:
        files: dict[str, str] = {}
        for row in self.rows:
            if isinstance(row.image, Path):
                files[row.key] = str(row.image)
        return files

    def _read_image(self, row: Row) -> bytes:
        try:
            if callable(row.image):
                return row.image()
            return read_regular(row.image or "", MAX_IMAGE)
        except OSError as error:
            reason = f"no image at {row.image}: {error.strerror}"
            raise BrokenSample(self.name, row.key, reason) from error
        except ValueError as error:
            reason = f"no image at {row.image}: {error}"
            raise BrokenSample(self.name, row.key, reason) from error


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder, at any depth, in the order of their paths: those that
    ``data make`` takes for pictures."""
    files: list[Path] = []
    for file in folder.rglob("*"):
        is_hidden = HIDDEN.search(file.relative_to(folder).as_posix()) is not None
        if file.suffix.lower() in PICTURES and not is_hidden and not file.is_dir():
            files.append(file)
    return sorted(files)


def recall(pairs: EmbeddedPairs, config: RetrievalConfig, **options: Any) -> ScoreFile:
    """Recall@k in both directions over all captions."""
    return report_retrieval(pairs, config, **options).scores()


def recall_by_language(
    pairs: EmbeddedPairs, config: RetrievalConfig, **options: Any
) -> ScoreFile:
    """The mean of the languages' recalls, each over its own captions; recall over all captions is
    ``all/...``."""
    scores = recall(pairs, config, **options)
    parts: set[str] = set()
    names: list[str] = []
    for key in scores.metrics:
        part, slash, _ = key.partition("/")
        if slash:
            parts.add(part)
        else:
            names.append(key)
    if not parts:
        return scores
    metrics = dict(scores.metrics)
    for name in names:
        metrics[f"{ALL}/{name}"] = scores.metrics[name]
        of_languages = [scores.metrics[f"{part}/{name}"] for part in sorted(parts)]
        metrics[name] = sum(of_languages) / len(parts)
    notes = [*scores.notes, f"headline: mean over {len(parts)} languages"]
    return dataclasses.replace(scores, metrics=metrics, notes=notes)


def hard_negatives(
    pairs: EmbeddedPairs, config: RetrievalConfig | None = None, **options: Any
) -> ScoreFile:
    """Captions of kind ``GROUP/ID/right``, each against the next, ``GROUP/ID/wrong``; a tie counts
    one half.

    Metrics: one for each group, and ``mean``, the unweighted mean of the groups; chance is 0.5.
    Source: Hsieh et al., SugarCrepe (2023), section 4.
    """
    score_M = (pairs.image_ND[pairs.owner_M].double() * pairs.text_MD.double()).sum(1)
    gap_I = score_M[::2] - score_M[1::2]
    win_I = (gap_I > 0).double()
    tie_I = (gap_I == 0).double()
    hits = (win_I + 0.5 * tie_I).tolist()
    owners = pairs.owner_M[::2].tolist()
    items = []
    groups = defaultdict(list)
    for caption, hit, owner in zip(pairs.captions[::2], hits, owners, strict=True):
        name = caption.kind.removesuffix("/right")
        group = caption.kind.split("/")[0]
        groups[group].append(hit)
        items.append(
            {"id": name, "score": hit, "cluster": pairs.keys[owner], "part": group}
        )
    metrics: dict[str, float] = {}
    for group, of_group in groups.items():
        metrics[group] = sum(of_group) / len(of_group)
    return ScoreFile(
        benchmark="",
        metrics=metrics | {"mean": sum(metrics.values()) / len(metrics)},
        items=items,
        counts={
            "images": len(pairs.keys),
            "items": len(items),
            "left_out": len(pairs.broken),
        },
        notes=[f"left out: {error}" for error in pairs.broken],
    )


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One benchmark. ``paper``: R@1 image->text and text->image in percent, single runs without
    intervals."""

    name: str  # of the suite and of its folder below the root
    # path in the suite's folder, or alternatives separated by "|" -> where to get it
    requires: Mapping[str, str]
    read: Callable[[Path], list[Row]]  # the suite's folder -> its images and captions
    # recall | recall_by_language | hard_negatives
    measure: Callable[..., ScoreFile] = recall
    choose: bool = True  # --kinds and --languages choose among its captions
    # of the published test set, any other number is reported; 0: don't check
    images: int = 0
    # title of the table that the suite is a column of, recall only; "": none
    table: str = ""
    # row of that table -> (i2t, t2i)
    paper: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    # public review of versions 1 and 2 | authors' project page
    paper_source: Literal["review", "site"] = "review"

    def missing(self, root: Path) -> list[str]:
        """One line for each file or folder that does not exist: its path and where to get it."""
        lines = []
        for names, origin in self.requires.items():
            paths = [root / self.name / name for name in names.split("|")]
            if not any(path.exists() for path in paths):
                lines.append(
                    f"{self.name}: {' or '.join(map(str, paths))} not found; get it from {origin}"
                )
        return lines

    def open(self, root: Path) -> InMemorySource:
        """The suite as a data source; ValueError for files of another layout."""
        folder = root / self.name
        with errors_about(
            folder, fix="its files are expected as their authors publish them"
        ):
            return InMemorySource(self.name, folder, self.read(folder))


def suites() -> dict[str, Suite]:
    """Every suite by name; those of the paper in the order of its tables."""
    return discover(__name__, "SUITE")


def select_suites(names: str) -> list[Suite]:
    """The suites of names separated by commas, ``paper`` and ``all`` among them. ValueError for an
    unknown one."""
    suites_by_name = suites()
    groups = {
        "paper": [name for name, suite in suites_by_name.items() if suite.paper],
        "all": list(suites_by_name),
    }
    selected: dict[str, Suite] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in suites_by_name and name not in groups:
            raise ValueError(unknown("suite", name, [*groups, *suites_by_name]))
        selected |= {
            member: suites_by_name[member] for member in groups.get(name, [name])
        }
    return list(selected.values())


def to_captions(
    texts: Iterable[str], kind: str = "short", language: str = "en"
) -> tuple[Caption, ...]:
    """Captions with line breaks and repeated spaces collapsed; blank texts are dropped."""
    one_line = [" ".join(text.split()) for text in texts]
    return tuple(Caption(text, kind, language) for text in one_line if text)


def first_existing(*folders: Path) -> Path:
    """The first of the folders that exists; the first one if none does."""
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def read_json_lines(path: Path) -> list[Any]:
    """The objects of a JSON Lines file; ValueError names the file."""
    with errors_about(path), path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
