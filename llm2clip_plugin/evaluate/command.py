"""``llm2clip evaluate``: retrieval recall of a tower directory on a dataset whose captions are cached."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.sources.open import SourceConfig, open_source
from llm2clip_plugin.evaluate.command_line import (
    OpenedTower,
    dataset_name,
    on_all_ranks,
    open_tower,
    parse_options,
    tower_provenance,
    write_scores,
)
from llm2clip_plugin.evaluate.retrieval import RetrievalConfig
from llm2clip_plugin.evaluate.retrieval_report import RetrievalReport, evaluate_retrieval
from llm2clip_plugin.evaluate.tables import print_retrieval
from llm2clip_plugin.evaluate.teacher import open_teacher_cache


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Retrieval recall of a tower. Usage: llm2clip evaluate TOWER_DIR --data PATH [--cache DIR] [options].

    Under torchrun or the deepspeed launcher the ranks split the work. For benchmarks by name (flickr30k, coco, docci,
    sugarcrepe ...) run llm2clip evaluate TOWER_DIR --suite paper --root DIR; see llm2clip evaluate --suite all --help.
    """

    tower: str  # tower directory or Hub id, with a text adapter
    data: SourceConfig  # captioned images
    cache: str = ""  # the teacher's embeddings of the captions; "": embeddings-<fingerprint> in the data's folder
    retrieval: Annotated[RetrievalConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=RetrievalConfig)
    any_teacher: bool = False  # accept a cache from a different teacher than the tower's
    device: str = ""  # cpu, cuda, cuda:1 ...; "": the accelerator, if there is one
    resamples: int = 2000  # bootstrap resamples of the intervals; 0: no intervals
    json: str = ""  # write the metrics and every query's hits here (a score file)


def main(argv: list[str]) -> int:
    """``llm2clip evaluate TOWER_DIR --data PATH``; with ``--suite`` the benchmarks by name."""
    if any(word == "--suite" or word.startswith("--suite=") for word in argv):
        from llm2clip_plugin.evaluate.suite_command import main as suites

        return suites(argv)
    config = parse(argv)

    def report(measured: tuple[OpenedTower, RetrievalReport]) -> None:
        tower, retrieval = measured
        intervals = retrieval.intervals(config.resamples) if config.resamples else {}
        print_retrieval(retrieval, intervals, title=f"{config.tower} on {config.data.path}")
        write_scores(score_file(config, tower, retrieval), config.json)

    return on_all_ranks(lambda all_ranks: measure(config, all_ranks=all_ranks), report)


def parse(argv: list[str]) -> EvaluateConfig:
    """The configuration; ``--data`` is short for ``--data.path``."""
    words = ["--data.path" if word == "--data" else word.replace("--data=", "--data.path=", 1) for word in argv]
    return parse_options(EvaluateConfig, words, prog="llm2clip evaluate")


def measure(config: EvaluateConfig, *, all_ranks: bool = False) -> tuple[OpenedTower, RetrievalReport]:
    """Open the tower, the data and the cache, check that they belong together, and measure.

    Raises FileNotFoundError, ContractError (another teacher, other captions) or ValueError.
    """
    tower = open_tower(config.tower, config.device)
    source = open_source(config.data)
    cache = open_teacher_cache(tower.dual.card, config.cache, config.data, any_teacher=config.any_teacher)
    cache.check(source)
    report = evaluate_retrieval(tower.dual, source, cache, tower.images, config.retrieval, all_ranks=all_ranks)
    return tower, report


def score_file(config: EvaluateConfig, tower: OpenedTower, report: RetrievalReport) -> ScoreFile:
    """The report as the record that `llm2clip compare` reads."""
    return dataclasses.replace(
        report.scores(),
        benchmark=f"retrieval:{dataset_name(config.data.path)}",
        model=config.tower,
        provenance=tower_provenance(
            tower.dual,
            teacher=tower.dual.card.teacher,
            data=config.data.path,
            ties=config.retrieval.ties,
            group=config.retrieval.group,
        ),
    )
