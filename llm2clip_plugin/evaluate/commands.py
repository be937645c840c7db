"""``llm2clip evaluate``: retrieval recall of a tower on data whose captions are cached, or on benchmarks by name."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llm2clip_plugin.bootstrap import Interval, bootstrap_mean
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.sources import check_fields, open_source
from llm2clip_plugin.evaluate.config import EVALUATE, EvaluateConfig
from llm2clip_plugin.evaluate.opening import (
    NOTES_SHOWN,
    OpenedTower,
    check_measurable,
    dataset_name,
    on_all_ranks,
    open_tower,
    provenance,
    wide_console,
    write_scores,
)
from llm2clip_plugin.evaluate.retrieval import ALL, RetrievalReport, embed_pairs, evaluate_retrieval
from llm2clip_plugin.evaluate.suites import Suite, select_suites, suites
from llm2clip_plugin.train.distributed import group_of, on_first_rank, rank


def main(argv: list[str]) -> int:
    """``llm2clip evaluate TOWER DATA``; with ``--suite`` the benchmarks by name."""
    config = EVALUATE.parse(argv)
    if config.suite:
        return main_suites(config)

    def measure(all_ranks: bool) -> ScoreFile:
        tower, report = measure_pairs(config, all_ranks=all_ranks)
        facts = {"teacher": tower.dual.card.teacher, "data": config.data.path, "group": config.retrieval.group}
        return dataclasses.replace(
            report.scores(),
            benchmark=f"retrieval:{dataset_name(config.data.path)}",
            model=config.tower,
            provenance=provenance(tower.dual, **facts),
        )

    def report(scores: ScoreFile) -> None:
        clusters = len({item["cluster"] for item in scores.items})
        caption = f"i2t: image to text; ties count half; \\[95 % interval] over {clusters} clusters"
        console = wide_console()
        console.print(score_table(f"{config.tower} on {config.data.path}", scores, intervals(scores), caption))
        for note in scores.notes[:NOTES_SHOWN]:
            console.print(note, markup=False)
        write_scores(scores, config.json)

    return on_all_ranks(measure, report)


def measure_pairs(config: EvaluateConfig, *, all_ranks: bool = False) -> tuple[OpenedTower, RetrievalReport]:
    """Open the tower, the data and the cache, embed captions that it lacks, and measure."""
    source = open_source(config.data)
    check_fields(source)
    on_first_rank(lambda: check_measurable(source, config.retrieval))
    tower = open_tower(config.tower, config.device, config.teacher)
    cache = tower.cache(source, config.cache, all_ranks=all_ranks)
    return tower, evaluate_retrieval(tower.dual, source, cache, tower.images, config.retrieval, all_ranks=all_ranks)


def intervals(scores: ScoreFile) -> dict[str, Interval]:
    """Of recall at the first k in every part and direction, by the metric's name."""
    queries: dict[str, list[dict[str, Any]]] = {}
    for item in scores.items:
        k = next(key for key in item if key.startswith("r"))
        prefix = "" if item["part"] == ALL else f"{item['part']}/"
        queries.setdefault(f"{prefix}{item['side']}_{k}", []).append(item)
    return {
        name: bootstrap_mean([item["score"] for item in some], [item["cluster"] for item in some])
        for name, some in queries.items()
    }


def score_table(title: str, scores: ScoreFile, found: Mapping[str, Interval] | None = None, caption: str = "") -> Table:
    """Every metric in percent, with its interval in ``found``: one row per part, one column per metric."""
    found, rows = found or {}, dict[str, dict[str, str]]()
    for name, value in scores.metrics.items():
        part, _, metric = name.rpartition("/")
        shown = f" \\[{100 * found[name].low:.1f}, {100 * found[name].high:.1f}]" if name in found else ""
        rows.setdefault(part, {})[metric] = f"{100 * value:.1f}{shown}"
    columns = list(dict.fromkeys(metric for row in rows.values() for metric in row))
    counts = ", ".join(f"{number} {name}" for name, number in scores.counts.items())
    table = Table("captions", title=title, caption="; ".join(filter(None, ["percent", counts, caption])))
    for column in columns:
        table.add_column(column, justify="right")
    for part, row in rows.items():
        table.add_row(part or ("headline" if ALL in rows else ALL), *(row.get(name, "") for name in columns))
    return table


def main_suites(config: EvaluateConfig) -> int:
    """Measure the suites whose files exist; 0 unless there is none."""
    selected, root = select_suites(config.suite), Path(config.data.path)
    missing = {suite.name: lines for suite in selected if (lines := suite.missing(root))}
    missing_lines = [line for lines in missing.values() for line in lines]
    ready = [suite for suite in selected if suite.name not in missing]
    if not ready:
        raise FileNotFoundError("\n".join(missing_lines))

    def report(results: dict[str, ScoreFile]) -> None:
        console, known = wide_console(), suites()
        for title in dict.fromkeys(suite.table for suite in known.values() if suite.table):
            columns = [suite for suite in known.values() if suite.table == title]
            if any(suite.name in results for suite in columns):
                console.print(paper_table(title, columns, config.tower, results))
        for name, scores in results.items():
            console.print(score_table(known[name].title, scores))
            for note in scores.notes:
                console.print(f"{name}: {note}", markup=False, soft_wrap=True)
        for line in missing_lines:
            Console(stderr=True).print(f"skipped {line}", markup=False, soft_wrap=True)

    return on_all_ranks(partial(measure_suites, config, ready), report)


def measure_suites(config: EvaluateConfig, ready: list[Suite], all_ranks: bool) -> dict[str, ScoreFile]:
    """The score file of each suite: read if its provenance is the same, else measured and written by rank 0."""
    tower, root = open_tower(config.tower, config.device, config.teacher), Path(config.data.path)
    output = Path(config.json or root / f"scores-{tower.dual.card.weights_sha256[:12]}")
    settings = dataclasses.asdict(config.retrieval) | {"batch": 0, "workers": 0}
    settings = json.loads(json.dumps(settings))  # as read back
    results = {}
    for suite in ready:
        source = suite.open(root)
        cache = tower.cache(source, all_ranks=all_ranks)
        captions = cache.manifest.shards[suite.name]["rows_sha256"]
        facts = {"teacher": cache.fingerprint, "captions_sha256": captions, "settings": settings}
        origin = provenance(tower.dual, **facts)  # everything that decides the scores but the image files
        path = output / f"{suite.name}.scores.json"
        if not config.overwrite and path.is_file() and (before := ScoreFile.read(path)).provenance == origin:
            results[suite.name] = before
            continue
        everything = dataclasses.replace(config.retrieval, kinds=(), languages=())
        chosen = config.retrieval if suite.choose else everything
        pairs = embed_pairs(tower.dual, source, cache, tower.images, chosen, all_ranks=all_ranks)
        scores = suite.measure(pairs, chosen, all_ranks=all_ranks, device=tower.device)
        notes = list(scores.notes)
        if suite.images and scores.counts["images"] != suite.images:
            notes.append(f"{scores.counts['images']} images, the published test set has {suite.images}")
        results[suite.name] = dataclasses.replace(
            scores, benchmark=f"retrieval:{suite.name}", model=config.tower, provenance=origin, notes=notes
        )
        if rank(group_of(all_ranks)) == 0:
            results[suite.name].write(path)
    return results


def paper_table(title: str, columns: Sequence[Suite], model: str, results: Mapping[str, ScoreFile]) -> Table:
    """R@1 image->text / text->image in percent; the paper's rows first, ours last with 95 % intervals."""
    caption = "R@1 image->text / text->image, percent; the paper's rows are single runs"
    table = Table("tower", "source", title=title, caption=caption)
    for suite in columns:
        table.add_column(suite.name, justify="right")
    for row, source in {row: suite.paper_source for suite in columns for row in suite.paper}.items():
        table.add_row(row, f"paper, {source}", *(_pair(suite.paper.get(row)) for suite in columns))
    ours = [_ours(results[suite.name]) if suite.name in results else "not measured" for suite in columns]
    table.add_section()
    table.add_row(dataset_name(model), "measured", *ours, style="bold")
    return table


def _pair(scores: tuple[float, float] | None) -> str:
    return "" if scores is None else f"{scores[0]:.1f} / {scores[1]:.1f}"


def _ours(scores: ScoreFile) -> str:
    """The headline, and below it the half-widths of its intervals; a mean over languages has none."""
    names = "i2t_r1", "t2i_r1"
    first = _pair((100 * scores.metrics[names[0]], 100 * scores.metrics[names[1]]))
    if f"{ALL}/{names[0]}" in scores.metrics:
        return first
    found = intervals(scores)
    return f"{first}\n{' / '.join(f'±{50 * (found[name].high - found[name].low):.1f}' for name in names)}"
