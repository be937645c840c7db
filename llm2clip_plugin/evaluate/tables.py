"""Evaluation results as tables on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from llm2clip_plugin.bootstrap import Interval
from llm2clip_plugin.evaluate.measure import RetrievalReport

TIES = {
    "half": "ties share the credit",
    "optimistic": "ties count as hits",
    "pessimistic": "ties count as misses",
    "lowest_index_first": "ties in the items' order",
}


def wide_console() -> Console:
    """Standard output; where it is no terminal (a log, a pipe) lines are long enough for any table."""
    return Console(width=None if sys.stdout.isatty() else 200)


def print_retrieval(report: RetrievalReport, intervals: Mapping[str, Interval], *, title: str) -> None:
    """Recall in percent of every part, both ways, with the interval of the first k, and the control."""
    config, metrics = report.config, report.metrics()
    columns = [(side, k) for side in ("i2t", "t2i") for k in config.ks]
    table = Table(title=title, caption=caption(report, bool(intervals)))
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
    for error in report.pairs.broken[:10]:
        console.print(f"left out: {error}", markup=False)


def cell(metrics: Mapping[str, float], intervals: Mapping[str, Interval], name: str) -> str:
    """``45.1 [43.0, 47.2]``."""
    value = f"{100 * metrics[name]:.1f}"
    interval = intervals.get(name)
    return value if interval is None else f"{value} \\[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def caption(report: RetrievalReport, with_intervals: bool) -> str:
    """What was counted, and how."""
    counts, config = report.counts, report.config
    parts = [
        f"percent; i2t: image to text; {counts['images']} images, {counts['captions']} captions; {TIES[config.ties]}"
    ]
    if counts["left_out"]:
        parts.append(f"{counts['left_out']} samples left out")
    if config.group:
        parts.append(f"right: the same {config.group}")
    if with_intervals:
        cluster = config.cluster or config.group or "image"
        parts.append(f"[95 % interval], bootstrap over {len(set(report.cluster_N))} of {cluster}".replace("[", "\\["))
    return "; ".join(parts)
