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
TIES = {
    "half": "ties split the credit",
    "optimistic": "ties count as hits",
    "pessimistic": "ties count as misses",
    "lowest_index_first": "ties in the order of the items",
}


def print_retrieval(report: RetrievalReport, intervals: Mapping[str, Interval], *, title: str) -> None:
    """Recall of every part in percent, in both directions, with the interval of the first k; and of the control."""
    config, metrics = report.config, report.metrics()
    columns = [(side, k) for side in SIDES for k in config.ks]
    table = Table(title=title, caption=table_caption(report, bool(intervals)))
    table.add_column("captions")
    for side, k in columns:
        table.add_column(f"{side} R@{k}", justify="right")
    rows = [("" if name == "all" else f"{name}/", name) for name in report.parts]
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


def table_caption(report: RetrievalReport, with_intervals: bool) -> str:
    """What was counted and how, below the table."""
    counts, config = report.counts, report.config
    parts = [
        f"percent; i2t: image to text; {counts['images']} images, {counts['captions']} captions; {TIES[config.ties]}"
    ]
    if counts["left_out"]:
        parts.append(f"{counts['left_out']} samples left out")
    if config.group:
        parts.append(f"correct: same {config.group}")
    if with_intervals:
        cluster = config.cluster or config.group or "image"
        parts.append(f"\\[95 % interval], bootstrap over {len(set(report.cluster_N))} clusters by {cluster}")
    return "; ".join(parts)


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
    table = Table(title=title, caption="R@1 image->text / text->image, percent; the paper's rows are single runs")
    table.add_column("tower")
    table.add_column("source")
    for suite in columns:
        table.add_column(suite.name, justify="right")
    sources = {row: suite.paper_source for suite in columns for row in suite.paper}
    base = ""
    for row, source in sources.items():
        if not row.startswith(f"{base} + "):
            base = row
        shown = row if row == base else row.removeprefix(f"{base} ")  # "+ LLM2CLIP", below the tower it starts from
        table.add_row(shown, f"paper, {source}", *(_pair(suite.paper.get(row)) for suite in columns))
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
