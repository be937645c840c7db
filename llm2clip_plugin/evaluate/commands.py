"""``llm2clip evaluate``: retrieval recall of a tower on data whose captions are cached, or on benchmarks by name."""

import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llm2clip_plugin.bootstrap import Interval, bootstrap_mean
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.sources import check_fields, open_source
from llm2clip_plugin.evaluate import opening
from llm2clip_plugin.evaluate.config import EVALUATE, EvaluateConfig
from llm2clip_plugin.evaluate.retrieval import RetrievalReport, embed_pairs, evaluate_retrieval
from llm2clip_plugin.evaluate.suites import Suite, select_suites, suites
from llm2clip_plugin.train.distributed import group_of, on_first_rank, rank

FIRST = "i2t_r1", "t2i_r1"  # what the paper reports


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
            benchmark=f"retrieval:{opening.dataset_name(config.data.path)}",
            model=config.tower,
            provenance=opening.provenance(tower.dual, **facts),
        )

    def report(scores: ScoreFile) -> None:
        clusters = len({item["cluster"] for item in scores.items})
        caption = f"i2t: image to text; ties count half; [95 % interval] over {clusters} clusters"
        opening.print_scores(f"{config.tower} on {config.data.path}", scores, intervals(scores), caption)
        opening.write_scores(scores, config.json)

    return opening.on_all_ranks(measure, report)


def measure_pairs(config: EvaluateConfig, *, all_ranks: bool = False) -> tuple[opening.OpenedTower, RetrievalReport]:
    """Open the tower, the data and the cache, embed captions that it lacks, and measure."""
    source = open_source(config.data)
    check_fields(source)
    on_first_rank(lambda: opening.check_measurable(source, config.retrieval))
    tower = opening.open_tower(config.tower, config.device, config.teacher)
    cache = tower.cache(source, config.cache, all_ranks=all_ranks)
    return tower, evaluate_retrieval(tower.dual, source, cache, tower.images, config.retrieval, all_ranks=all_ranks)


def intervals(scores: ScoreFile) -> dict[str, Interval]:
    """Of recall at the first k in every part and direction, by the metric's name."""
    queries: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for item in scores.items:
        k = next(key for key in item if key.startswith("r"))
        prefix = "" if item["part"] == opening.ALL else f"{item['part']}/"
        queries[f"{prefix}{item['side']}_{k}"].append(item)
    return {
        name: bootstrap_mean([item["score"] for item in some], [item["cluster"] for item in some])
        for name, some in queries.items()
    }


def main_suites(config: EvaluateConfig) -> int:
    """Measure the suites whose files exist; 0 unless there is none."""
    selected, root = select_suites(config.suite), Path(config.data.path)
    missing = [line for suite in selected for line in suite.missing(root)]
    ready = [suite for suite in selected if not suite.missing(root)]
    if not ready:
        raise FileNotFoundError("\n".join(missing))

    def report(results: dict[str, ScoreFile]) -> None:
        known = suites().values()
        for title in dict.fromkeys(suite.table for suite in known if suite.table):
            columns = [suite for suite in known if suite.table == title]
            if any(suite.name in results for suite in columns):
                print_paper_table(title, columns, config.tower, results)
        for name, scores in results.items():
            opening.print_scores(name, scores, {})
        for line in missing:
            print(f"skipped {line}", file=sys.stderr)

    return opening.on_all_ranks(partial(measure_suites, config, ready), report)


def measure_suites(config: EvaluateConfig, ready: list[Suite], all_ranks: bool) -> dict[str, ScoreFile]:
    """The score file of each suite: read if its provenance is the same, else measured and written by rank 0."""
    tower, root = opening.open_tower(config.tower, config.device, config.teacher), Path(config.data.path)
    output = Path(config.json or root / f"scores-{tower.dual.card.weights_sha256[:12]}")
    settings = dataclasses.asdict(config.retrieval) | {"batch": 0, "workers": 0}
    settings = json.loads(json.dumps(settings))  # tuples are lists in the file
    results = {}
    for suite in ready:
        source = suite.open(root)
        cache = tower.cache(source, all_ranks=all_ranks)
        captions = cache.manifest.shards[suite.name]["rows_sha256"]
        facts = {"teacher": cache.fingerprint, "captions_sha256": captions, "settings": settings}
        origin = opening.provenance(tower.dual, **facts)  # everything that decides the scores but the image files
        path = output / f"{suite.name}.scores.json"
        if not config.overwrite and path.is_file() and (before := ScoreFile.read(path)).provenance == origin:
            results[suite.name] = before
            continue
        chosen = config.retrieval if suite.choose else dataclasses.replace(config.retrieval, kinds=(), languages=())
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


def print_paper_table(title: str, columns: Sequence[Suite], model: str, results: Mapping[str, ScoreFile]) -> None:
    """R@1 image->text / text->image in percent: the paper's rows, then ours with the half-widths of its intervals."""
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for suite in columns:
        for tower, scores in suite.paper.items():
            rows[f"{tower} (paper, {suite.paper_source})"][suite.name] = _pair(*scores)
    ours, half = rows[f"{opening.dataset_name(model)} (measured)"], rows["95 % interval, ±"]
    for suite in columns:
        if (scores := results.get(suite.name)) is None:
            ours[suite.name] = "not measured"
            continue
        ours[suite.name] = _pair(*(100 * scores.metrics[name] for name in FIRST))
        if f"{opening.ALL}/{FIRST[0]}" not in scores.metrics:  # a mean over languages has none
            found = intervals(scores)
            half[suite.name] = _pair(*(50 * (found[name].high - found[name].low) for name in FIRST))
    opening.print_table(title, rows, "R@1 image->text / text->image, percent; the paper's rows are single runs")


def _pair(i2t: float, t2i: float) -> str:
    return f"{i2t:.1f} / {t2i:.1f}"
