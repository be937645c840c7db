"""The tables of ``llm2clip evaluate``: one dataset's retrieval, and the suites next to the paper's results."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from llm2clip_plugin.bootstrap import Interval, bootstrap_mean
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.evaluate.command_line import NOTES_SHOWN, wide_console
from llm2clip_plugin.evaluate.retrieval_report import ALL, RetrievalReport
from llm2clip_plugin.evaluate.suite import Suite
from llm2clip_plugin.evaluate.suites import suites

SIDES = ("i2t", "t2i")


def print_retrieval(report: RetrievalReport, intervals: Mapping[str, Interval], *, title: str) -> None:
    """Recall of every part in percent, in both directions, with the interval of the first k; and of the control."""
    config, metrics, counts = report.config, report.metrics(), report.counts
    caption = [
        f"percent; i2t: image to text; {counts['images']} images, {counts['captions']} captions; ties count half"
    ]
    caption += [f"correct: same {config.group}"] if config.group else []
    if intervals:
        cluster = config.cluster or config.group or "image"
        caption.append(f"\\[95 % interval], bootstrap over {len(set(report.cluster_N))} clusters by {cluster}")
    table = Table("captions", title=title, caption="; ".join(caption))
    columns = [(side, k) for side in SIDES for k in config.ks]
    for side, k in columns:
        table.add_column(f"{side} R@{k}", justify="right")
    rows = [("" if name == ALL else f"{name}/", name) for name in report.parts]
    rows += [("shuffled/", "shuffled"), ("chance/", "chance")] if report.control is not None else []
    for prefix, name in rows:
        cells = (cell(metrics, intervals if k == config.ks[0] else {}, f"{prefix}{side}_r{k}") for side, k in columns)
        table.add_row(name, *cells)
    console = wide_console()
    console.print(table)
    for error in report.pairs.broken[:NOTES_SHOWN]:
        console.print(f"left out: {error}", markup=False)


def cell(metrics: Mapping[str, float], intervals: Mapping[str, Interval], name: str) -> str:
    """One metric in percent, with its interval if there is one: ``45.1 [43.0, 47.2]``."""
    value = f"{100 * metrics[name]:.1f}"
    interval = intervals.get(name)
    return value if interval is None else f"{value} \\[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def print_suites(model: str, results: Mapping[str, ScoreFile], resamples: int) -> None:
    """The paper's tables with a row for ``model``, then every metric of each suite with its notes."""
    console, known = wide_console(), suites()
    for title in dict.fromkeys(suite.table for suite in known.values() if suite.table):
        columns = [suite for suite in known.values() if suite.table == title]
        if any(suite.name in results for suite in columns):
            console.print(paper_table(title, columns, model, results, resamples))
    for name, scores in results.items():
        console.print(suite_table(known[name].title, scores))
        for note in scores.notes:
            console.print(f"{name}: {note}", markup=False, soft_wrap=True)


def paper_table(
    title: str, columns: Sequence[Suite], model: str, results: Mapping[str, ScoreFile], resamples: int
) -> Table:
    """R@1 image->text / text->image in percent; the paper's rows first, ours last with 95 % intervals."""
    caption = "R@1 image->text / text->image, percent; the paper's rows are single runs"
    table = Table("tower", "source", title=title, caption=caption)
    for suite in columns:
        table.add_column(suite.name, justify="right")
    for row, source in {row: suite.paper_source for suite in columns for row in suite.paper}.items():
        table.add_row(row, f"paper, {source}", *(_pair(suite.paper.get(row)) for suite in columns))
    ours = [_ours(results[suite.name], resamples) if suite.name in results else "not measured" for suite in columns]
    table.add_section()
    table.add_row(model.rstrip("/").rpartition("/")[2], "measured", *ours, style="bold")
    return table


def _pair(scores: tuple[float, float] | None) -> str:
    return "" if scores is None else f"{scores[0]:.1f} / {scores[1]:.1f}"


def _ours(scores: ScoreFile, resamples: int) -> str:
    """The headline, and below it the half-widths of its intervals."""
    first = _pair((100 * scores.metrics["i2t_r1"], 100 * scores.metrics["t2i_r1"]))
    is_mean = f"{ALL}/i2t_r1" in scores.metrics  # a mean over languages has no interval
    if not resamples or is_mean:
        return first
    widths = []
    for side in SIDES:
        items = [item for item in scores.items if item["part"] == ALL and item["side"] == side]
        hits, clusters = [item["score"] for item in items], [item["cluster"] for item in items]
        interval = bootstrap_mean(hits, clusters, resamples=resamples)
        widths.append(f"±{50 * (interval.high - interval.low):.1f}")
    return f"{first}\n{' / '.join(widths)}"


def suite_table(title: str, scores: ScoreFile) -> Table:
    """Every metric of a suite in percent: one row per part, one column per metric."""
    rows: dict[str, dict[str, float]] = {}
    for key, value in scores.metrics.items():
        part, _, metric = key.rpartition("/")
        rows.setdefault(part, {})[metric] = value
    columns = list(dict.fromkeys(metric for row in rows.values() for metric in row))
    counts = ", ".join(f"{number} {name}" for name, number in scores.counts.items())
    table = Table("captions", title=title, caption=f"percent; {counts}")
    for column in columns:
        table.add_column(column, justify="right")
    for part, row in rows.items():
        table.add_row(part or "headline", *(f"{100 * row[name]:.1f}" if name in row else "" for name in columns))
    return table
