"""Evaluation results as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from llm2clip_plugin.evaluate.bootstrap import Interval
from llm2clip_plugin.evaluate.measure import RetrievalReport

TIES = {
    "half": "ties share the credit",
    "optimistic": "ties count as hits",
    "pessimistic": "ties count as misses",
    "lowest_index_first": "ties in the items' order",
}


def print_retrieval(report: RetrievalReport, intervals: Mapping[str, Interval], *, title: str) -> None:
    """Recall in percent of every part, both ways, with the interval of the first k, and the control."""
    config, metrics = report.config, report.metrics()
    columns = [f"{side}_r{k}" for side in ("i2t", "t2i") for k in config.ks]
    table = Table(title=title, caption=caption(report, bool(intervals)))
    table.add_column("captions")
    for name in ("image -> text", "text -> image"):
        for k in config.ks:
            table.add_column(f"{name} R@{k}", justify="right")
    rows = [("" if name == "all" else f"{name}/", name) for name in report.parts]
    rows += [("shuffled/", "shuffled"), ("chance/", "chance")] if report.control is not None else []
    for prefix, name in rows:
        table.add_row(name, *(cell(metrics, intervals, prefix + column) for column in columns))
    Console().print(table)
    for error in report.pairs.broken[:10]:
        Console().print(f"left out: {error}", markup=False)


def cell(metrics: Mapping[str, float], intervals: Mapping[str, Interval], name: str) -> str:
    """``45.1 [43.0, 47.2]``."""
    value = f"{100 * metrics[name]:.1f}"
    interval = intervals.get(name)
    return value if interval is None else f"{value} \\[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def caption(report: RetrievalReport, with_intervals: bool) -> str:
    """What was counted, and how."""
    counts, config = report.counts, report.config
    parts = [f"percent; {counts['images']} images, {counts['captions']} captions; {TIES[config.ties]}"]
    if counts["left_out"]:
        parts.append(f"{counts['left_out']} samples left out")
    if config.group:
        parts.append(f"right: the same {config.group}")
    if with_intervals:
        cluster = config.cluster or config.group or "image"
        parts.append(
            f"[95 % interval: bootstrap over {cluster}, {len(set(report.cluster_N))} of them]".replace("[", "\\[")
        )
    return "; ".join(parts)
