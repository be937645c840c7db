"""Curves of training for the quickstart's page."""

from pathlib import Path

from llm2clip_plugin.pages import Chart, line_of, read_metrics


def training_charts(data: Path, output: Path) -> list[Chart]:
    """Loss and validation of both stages, a line for every training; a chart without lines is left out."""
    llm = [read_metrics(run) for run in sorted((data / "llm").glob("seed*"))]
    towers = [
        (side, read_metrics(run))
        for side in ("raw", "tuned")
        for run in sorted((output / "runs").glob(f"{side}-seed*"))
    ]
    both = ("i2t_r10", "t2i_r10")
    charts = [
        Chart(
            title="Stage 1: loss of the LLM",
            words="Contrastive loss on pairs of captions; lower is better. It dips where names meet long captions.",
            lines=[line for run in llm for line in line_of(run, "tuned", ["loss"])],
        ),
        Chart(
            title="Stage 1: keywords found from the name",
            words="Share of validation names whose keywords the LLM puts first; higher is better.",
            lines=[line for run in llm for line in line_of(run, "tuned", ["short->keywords"])],
        ),
        Chart(
            title="Stage 2: loss of the tower",
            words="Each tower against its own teacher: compare the slopes, not the heights.",
            lines=[line for side, run in towers for line in line_of(run, side, ["loss"])],
        ),
        Chart(
            title="Stage 2: captions and drawings found",
            words="Right answers among the first ten, validation families, both ways; higher is better. "
            "Step 0: new heads alone.",
            lines=[line for side, run in towers for line in line_of(run, side, both)],
        ),
    ]
    return [chart for chart in charts if chart.lines]
