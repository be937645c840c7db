"""``llm2clip evaluate TOWER DATA --suite NAMES``: benchmarks by name, and the paper's tables next to ours."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.cache.reader import EmbeddingCache
from llm2clip_plugin.evaluate.command_line import (
    OpenedTower,
    on_all_ranks,
    open_tower,
    tower_provenance,
)
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.evaluate.suite import Suite
from llm2clip_plugin.evaluate.suites import select_suites, suites
from llm2clip_plugin.evaluate.tables import print_suites
from llm2clip_plugin.evaluate.teacher import Teacher
from llm2clip_plugin.options.command import Command
from llm2clip_plugin.text.settings import EncoderConfig
from llm2clip_plugin.train.distributed import group_of, rank


@dataclass(frozen=True, kw_only=True)
class SuitesConfig:
    """Benchmarks by name."""

    tower: str  # tower directory or Hub id, with a text adapter
    suite: str  # names, separated by commas; paper: those that the paper reports; all: every one
    root: str  # folder with one folder per suite
    output: str = ""  # folder of the score files, one per suite; "": <root>/scores-<hash of the tower>
    teacher: EncoderConfig = field(default_factory=EncoderConfig)  # the tower's LLM, for captions not cached yet
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    device: str = ""  # cpu, cuda, cuda:1 ...; "": the accelerator, if there is one
    resamples: int = 2000  # bootstrap resamples of the intervals; 0: no intervals
    overwrite: bool = False  # measure again even where a score file exists


def command() -> Command[SuitesConfig]:
    """The command with the names of the suites that there are."""
    return Command(
        name="evaluate",
        example="llm2clip evaluate towers/l14-336 /data/benchmarks --suite paper",
        about=f"Measure benchmarks by name: {', '.join(suites())}. DATA has one folder for each; those with missing "
        "files are skipped, with a line that says where to get them. Captions are embedded once, into a cache in the "
        "suite's folder.",
        settings=SuitesConfig,
        arguments="tower root",
        everyday="suite output llm adapter batch-size workers limit resamples overwrite device",
        shown={"root": "data"},
    )


def main(argv: list[str]) -> int:
    """Measure the suites whose files exist; 0 unless there is none."""
    config = command().parse(argv)
    selected, root = select_suites(config.suite), Path(config.root)
    missing = {suite.name: lines for suite in selected if (lines := suite.missing(root))}
    missing_lines = [line for lines in missing.values() for line in lines]
    ready = [suite for suite in selected if suite.name not in missing]
    if not ready:
        raise FileNotFoundError("\n".join(missing_lines))

    def report(results: dict[str, ScoreFile]) -> None:
        print_suites(config.tower, results, config.resamples)
        for line in missing_lines:
            Console(stderr=True).print(f"skipped {line}", markup=False, soft_wrap=True)

    return on_all_ranks(lambda all_ranks: measure(config, ready, all_ranks=all_ranks), report)


def measure(config: SuitesConfig, ready: list[Suite], *, all_ranks: bool) -> dict[str, ScoreFile]:
    """The score file of each suite: read if its provenance is the same, else measured and written by rank 0."""
    tower, root = open_tower(config.tower, config.device), Path(config.root)
    card = tower.dual.card
    teacher = Teacher(card, config.teacher, tower.device)
    output = Path(config.output) if config.output else root / f"scores-{card.weights_sha256[:12]}"
    results = {}
    for suite in ready:
        source = suite.open(root)
        cache = teacher.cache(source, all_ranks=all_ranks)
        provenance = suite_provenance(tower, cache, config.retrieval, suite.name)
        path = output / f"{suite.name}.scores.json"
        if not config.overwrite and path.is_file() and (before := ScoreFile.read(path)).provenance == provenance:
            results[suite.name] = before
            continue
        scores = suite.measure(tower, source, cache, config.retrieval, all_ranks)
        notes = list(scores.notes)
        if suite.images and scores.counts["images"] != suite.images:
            notes.append(f"{scores.counts['images']} images, the published test set has {suite.images}")
        results[suite.name] = dataclasses.replace(
            scores, benchmark=f"retrieval:{suite.name}", model=config.tower, provenance=provenance, notes=notes
        )
        if rank(group_of(all_ranks)) == 0:
            results[suite.name].write(path)
    return results


def suite_provenance(tower: OpenedTower, cache: EmbeddingCache, config: RetrievalConfig, shard: str) -> dict[str, Any]:
    """Everything that decides the scores, except the image files."""
    settings = json.loads(json.dumps(dataclasses.asdict(config) | {"batch": 0, "workers": 0}))  # as read back
    captions = cache.manifest.shards[shard]["rows_sha256"]
    return tower_provenance(tower.dual, teacher=cache.fingerprint, captions_sha256=captions, settings=settings)
