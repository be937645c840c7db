"""A tower's suites beside the paper's rows, on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from llm2clip_plugin.bootstrap import bootstrap_mean
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.evaluate.measure import WHOLE
from llm2clip_plugin.evaluate.paper import TABLES
from llm2clip_plugin.evaluate.suites.registry import suites
from llm2clip_plugin.evaluate.tables import wide_console

SIDES = ("i2t", "t2i")


def print_suites(model: str, results: Mapping[str, ScoreFile], resamples: int) -> None:
    """The paper's tables with our row, then every metric of each suite, then what was found on the way."""
    console = wide_console()
    for title, (columns, rows) in TABLES.items():
        if any(name in results for name in columns):
            console.print(paper_table(title, columns, rows, model, results, resamples))
    for name, scores in results.items():
        console.print(suite_table(suites()[name].title, scores))
        for note in scores.notes:
            console.print(f"{name}: {note}", markup=False, soft_wrap=True)


def paper_table(title: str, columns: Sequence[str], rows, model: str, results, resamples: int) -> Table:
    """R@1 image->text / text->image in percent; the paper's rows first, ours last with 95 % intervals."""
    table = Table(title=title, caption="R@1 image->text / text->image, percent; the paper's rows are single runs")
    table.add_column("tower")
    table.add_column("source")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row.name, f"paper, {row.source}", *(_pair(row.scores.get(name)) for name in columns))
    ours = [_ours(results[name], resamples) if name in results else "not there" for name in columns]
    table.add_section()
    table.add_row(model.rstrip("/").rpartition("/")[2], "measured", *ours, style="bold")
    return table


def _pair(scores: tuple[float, float] | None) -> str:
    return "" if scores is None else f"{scores[0]:.1f} / {scores[1]:.1f}"


def _ours(scores: ScoreFile, resamples: int) -> str:
    """The headline, and below it how wide its intervals are to either side."""
    first = _pair((100 * scores.metrics["i2t_r1"], 100 * scores.metrics["t2i_r1"]))
    whole = f"{WHOLE}/i2t_r1" not in scores.metrics  # a mean over languages has no interval of its own
    if not resamples or not whole:
        return first
    widths = []
    for side in SIDES:
        items = [item for item in scores.items if item["part"] == WHOLE and item["side"] == side]
        hits, clusters = [item["score"] for item in items], [item["cluster"] for item in items]
        interval = bootstrap_mean(hits, clusters, resamples=resamples)
        widths.append(f"±{50 * (interval.high - interval.low):.1f}")
    return f"{first}\n{' / '.join(widths)}"


def suite_table(title: str, scores: ScoreFile) -> Table:
    """Every metric of a suite, percent: a row a part, a column a metric."""
    rows: dict[str, dict[str, float]] = {}
    for key, value in scores.metrics.items():
        part, slash, metric = key.rpartition("/")
        rows.setdefault(part if slash else "", {})[metric] = value
    columns = list(dict.fromkeys(metric for row in rows.values() for metric in row))
    counts = ", ".join(f"{number} {name}" for name, number in scores.counts.items())
    table = Table(title=title, caption=f"percent; {counts}")
    table.add_column("captions")
    for column in columns:
        table.add_column(column, justify="right")
    for part, row in rows.items():
        cells = (f"{100 * row[column]:.1f}" if column in row else "" for column in columns)
        table.add_row(part or "headline", *cells)
    return table
