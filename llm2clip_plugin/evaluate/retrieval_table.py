"""The table that ``llm2clip evaluate`` prints for retrieval."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from llm2clip_plugin.bootstrap import Interval
from llm2clip_plugin.evaluate.command_line import NOTES_SHOWN, wide_console
from llm2clip_plugin.evaluate.retrieval_report import RetrievalReport

TIES = {
    "half": "ties split the credit",
    "optimistic": "ties count as hits",
    "pessimistic": "ties count as misses",
    "lowest_index_first": "ties in the order of the items",
}


def print_retrieval(report: RetrievalReport, intervals: Mapping[str, Interval], *, title: str) -> None:
    """Recall of every part in percent, in both directions, with the interval of the first k; and of the control."""
    config, metrics = report.config, report.metrics()
    columns = [(side, k) for side in ("i2t", "t2i") for k in config.ks]
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
