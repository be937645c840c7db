"""The tables of README.md and docs/benchmarks.md that state the claims."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from claims_measured import CONTROLS, by_part

from llava_integration.evaluator.compare.multiplicity import holm
from llm2clip_plugin.bootstrap import t_cdf
from llm2clip_plugin.report_text import (
    estimate,
    markdown_table,
    p_value,
    spread,
)

sys.path.append(str(Path(__file__).with_name("quickstart")))
from claims import claims_table, map_cells

PERCENT = "{:.1f}".format
POINTS = "{:+.1f}".format
README_ROWS = {  # headline claim -> what README's table calls it
    "tower: names in languages of neither stage, caption → image": (
        "tower: name in another language → image"
    ),
    "teacher: names in languages of neither stage → English": (
        "LLM alone: name in another language → English name"
    ),
    "teacher: name → keywords without its words": (
        "LLM alone: English name → keywords that share no word with it"
    ),
}


def table(claims: Mapping[str, Any]) -> str:
    """The table of towers and teachers, as the quickstart prints it."""
    rows = []
    for name, claim in claims.items():
        by_seed = {}
        of_seeds = zip(claim["raw"], claim["tuned"], strict=True)
        for seed, (raw, tuned) in enumerate(of_seeds):
            by_seed[seed] = {"raw": raw, "tuned": tuned}
        rows.append({**claim, "name": name, "by_seed": by_seed})
    return claims_table(rows)


def readme_table(claims: Mapping[str, Any]) -> str:
    """README's table: a row per headline claim, in words that need no other page. The linear map
    has columns if a claim has it."""
    with_map = any(claim.get("map") for claim in claims.values())
    head = ["mean reciprocal rank (chance: .02)", "original LLM", "fine-tuned LLM"]
    head += ["fine-tuned minus original", "p"]
    if with_map:
        head.insert(2, "linear map")
        head.append("fine-tuned minus map")
    rows = []
    for name, claim in claims.items():
        strong = "**" if claim["significant"] else ""
        tuned = f"{strong}{spread(claim['tuned'])}{strong}"
        difference = estimate(claim["difference"], claim["interval"])
        p = p_value(claim["p_adjusted"])
        cells = [README_ROWS[name], spread(claim["raw"]), tuned, difference, p]
        if with_map:
            of_map, over_map = map_cells(claim.get("map"), len(claim["tuned"]))
            cells.insert(2, of_map)
            cells.append(over_map)
        rows.append(tuple(cells))
    return markdown_table(tuple(head), rows)


def llava_table(claims: Mapping[str, Any]) -> str:
    """The table of the LLaVA miniature: a row per claim."""
    head = (
        "language model: questions",
        "trainings a side",
        "tower before stage 2",
        "after",
        "difference",
        "p (Holm; seeds paired)",
        "random embeddings; after minus it",
        "raw LLM; after minus it",
    )
    paired = {side: paired_seeds(claims, side) for side in ("before", *CONTROLS)}
    rows = []
    for name, claim in claims.items():
        p_of = {side: p_of_claim[name] for side, p_of_claim in paired.items()}
        rows.append(llava_row(name, claim, p_of))
    return markdown_table(head, rows)


def llava_row(
    name: str, claim: Mapping[str, Any], paired_p: Mapping[str, float]
) -> tuple[str, ...]:
    """A claim's cells in ``llava_table``; ``paired_p``: of its seeds alone, against ``before`` and
    each control."""
    after = spread(claim["after"], PERCENT)
    p = p_value(claim["p_adjusted"])
    if claim["significant"]:
        after = f"**{after}**"
    else:
        p += ", not shown"
    cells = [
        f"{name} ({claim['questions']})",
        str(len(claim["after"])),
        spread(claim["before"], PERCENT),
        after,
        estimate(claim["difference"], claim["interval"], POINTS),
        f"{p} (paired {p_value(paired_p['before'])})",
    ]
    for side in CONTROLS:
        control = claim["controls"][side]
        values = spread(control["values"], PERCENT)
        difference = estimate(control["difference"], control["interval"], POINTS)
        p = f"{p_value(control['p_adjusted'])} (paired {p_value(paired_p[side])})"
        cells.append(f"{values}; {difference}, p {p}")
    return tuple(cells)


def paired_seeds(claims: Mapping[str, Any], side: str) -> dict[str, float]:
    """Claim -> p of ``after`` minus ``side`` (before or a control) by a paired t test over seeds,
    whose tower and batches both sides share, by Holm over the claims of its language model."""
    p_of: dict[str, float] = {}
    for claims_of_model in by_part(claims).values():
        unadjusted = []
        for claim in claims_of_model.values():
            if side == "before":
                base = claim["before"]
            else:
                base = claim["controls"][side]["values"]
            unadjusted.append(paired_t(base, claim["after"]))
        p_of |= dict(zip(claims_of_model, holm(unadjusted), strict=True))
    return p_of


def paired_t(base: Sequence[float], new: Sequence[float]) -> float:
    """Two-sided p of Student's paired t test; 1 for one pair."""
    difference_S = np.subtract(new, base)
    seeds = len(difference_S)
    if seeds < 2 or not difference_S.any():
        return 1.0
    error = float(np.std(difference_S, ddof=1)) / math.sqrt(seeds)
    if error == 0:
        return 0.0
    t = abs(float(difference_S.mean())) / error
    return 2 * (1 - t_cdf(t, seeds - 1))
