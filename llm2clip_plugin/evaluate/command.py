"""``llm2clip evaluate``: retrieval recall of a tower directory on a dataset whose captions are cached."""

import dataclasses

from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.sources.open import check_fields, open_source
from llm2clip_plugin.evaluate.command_line import (
    OpenedTower,
    dataset_name,
    on_all_ranks,
    open_tower,
    tower_provenance,
    write_scores,
)
from llm2clip_plugin.evaluate.options.retrieval import COMMAND, EvaluateConfig
from llm2clip_plugin.evaluate.preconditions import check_measurable
from llm2clip_plugin.evaluate.retrieval_report import RetrievalReport, evaluate_retrieval
from llm2clip_plugin.evaluate.tables import print_retrieval
from llm2clip_plugin.evaluate.teacher import open_teacher_cache
from llm2clip_plugin.train.distributed import on_first_rank


def main(argv: list[str]) -> int:
    """``llm2clip evaluate TOWER DATA``; with ``--suite`` the benchmarks by name."""
    if any(word == "--suite" or word.startswith("--suite=") for word in argv):
        from llm2clip_plugin.evaluate.suite_command import main as suites

        return suites(argv)
    config = COMMAND.parse(argv)

    def report(measured: tuple[OpenedTower, RetrievalReport]) -> None:
        tower, retrieval = measured
        intervals = retrieval.intervals(config.resamples) if config.resamples else {}
        print_retrieval(retrieval, intervals, title=f"{config.tower} on {config.data.path}")
        write_scores(score_file(config, tower, retrieval), config.json)

    return on_all_ranks(lambda all_ranks: measure(config, all_ranks=all_ranks), report)


def measure(config: EvaluateConfig, *, all_ranks: bool = False) -> tuple[OpenedTower, RetrievalReport]:
    """Open the tower, the data and the cache, check that they belong together, and measure.

    Raises FileNotFoundError, ContractError (another teacher, other captions) or ValueError.
    """
    source = open_source(config.data)
    check_fields(source)
    on_first_rank(lambda: check_measurable(source, config.retrieval))
    tower = open_tower(config.tower, config.device)
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
            group=config.retrieval.group,
        ),
    )
