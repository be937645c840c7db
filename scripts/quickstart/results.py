"""What the quickstart measured, as tables, sentences and JSON, and what a short run must reach."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from claims import Claim, as_record, claims_table, headline, seeds_table
from domain import DomainReport
from page import Table
from scores import LONG_CAPTIONS, Rows, teacher_scores
from tables import TEACHERS, Tower, by_name, language_table, retrieval_table, teacher_table

HEADLINE = (  # chosen before the seeds were run; the other claims are listed below them, significant or not
    "tower: names in languages never trained on, caption → image",
    "teacher: names in languages never trained on → English",
    "teacher: name → keywords without its words",
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The measurements and notes on them."""

    towers: list[Tower]
    teachers: dict[str, list[dict[str, float]]]  # raw | tuned -> test -> score, of each adapter
    claims: list[Claim]  # the headline's first; [] without both teachers
    over_plain: list[Claim]  # the fine-tuned LLM against the raw one as it comes; [] without that control
    notes: list[str]
    inputs: dict[str, dict[str, Any]]  # tower -> what its training read
    domain: DomainReport | None = None

    @property
    def headlines(self) -> list[str]:
        """A sentence for each claim of the headline."""
        return [headline(one) for one in self.claims if one.name in HEADLINE]

    @property
    def sentences(self) -> list[str]:
        """The headlines, then what was shown on the unseen domain and what was not."""
        return [*self.headlines, *(self.domain.sentences if self.domain else [])]

    @property
    def tables(self) -> list[Table]:
        """The tables: claims, those by seed, retrieval, teachers, languages."""
        tables = [claims_table(self.claims, TEACHERS)] if self.claims else []
        if self.claims and len(self.claims[0].by_seed) > 1:
            tables.append(seeds_table(self.claims))
        if self.over_plain:
            names = {**TEACHERS, "raw": TEACHERS["plain"]}
            tables.append(claims_table(self.over_plain, names, "And against the raw LLM as it comes?"))
        return [*tables, retrieval_table(self.towers), teacher_table(self.teachers), language_table(self.towers)]


def in_order(claims: Sequence[Claim]) -> list[Claim]:
    """The headline's first."""
    return sorted(claims, key=lambda one: HEADLINE.index(one.name) if one.name in HEADLINE else len(HEADLINE))


def top_1(teachers: Mapping[str, Rows]) -> dict[str, list[dict[str, float]]]:
    """raw | tuned -> test -> top-1, of each adapter."""
    scores = {
        name: [teacher_scores(rows) for folder, rows in teachers.items() if folder.split("-")[0] == name]
        for name in TEACHERS
    }
    return {name: seeds for name, seeds in scores.items() if seeds}


def as_json(report: Report) -> str:
    """Every number, as JSON."""
    body: dict[str, Any] = {"notes": report.notes, "inputs": report.inputs, "teachers": report.teachers}
    body["towers"] = defaultdict(dict)
    for tower in report.towers:
        languages = {tag: tower.scores.part("test", "short", tag) for tag in tower.scores.languages}
        body["towers"][tower.name][f"seed{tower.seed}"] = {**tower.scores.tests(), "languages": languages}
    body["chance"] = report.towers[0].scores.tests(chance=True)
    return json.dumps(body, indent=2, ensure_ascii=False) + "\n"


def as_headline(report: Report) -> str:
    """The claims as JSON: the headline, and the others whether significant or not."""
    split: dict[str, list[Claim]] = {"headline": [], "others": []}
    for one in report.claims:
        split["headline" if one.name in HEADLINE else "others"].append(one)
    body = {"sentences": report.sentences, **{name: [as_record(one) for one in part] for name, part in split.items()}}
    body |= {"over_plain": [as_record(one) for one in report.over_plain]}
    if report.domain:
        body |= {"domain": report.domain.as_record()}
    return json.dumps({**body, "notes": report.notes}, indent=2, ensure_ascii=False) + "\n"


def failures(report: Report) -> list[str]:
    """Requirements that a short run missed: towers above the control, a fine-tuned teacher above the raw one."""
    failed = []
    recall = {
        name: np.mean([tower.scores.tests()[LONG_CAPTIONS]["i2t_r10"] for tower in seeds])
        for name, seeds in by_name(report.towers).items()
    }
    for name, value in recall.items():
        if name not in ("shuffled", "random") and value <= recall["shuffled"]:
            failed.append(
                f"R@10 of {TEACHERS[name]!r} is {value:.3f}, not above the control's {recall['shuffled']:.3f}"
            )
    test = "name → keywords without its words, plain"
    top = {name: np.mean([scores[test] for scores in seeds]) for name, seeds in report.teachers.items()}
    if "tuned" in top and top["tuned"] <= top["raw"]:
        failed.append(f"{test}: fine-tuned {top['tuned']:.3f}, not above raw {top['raw']:.3f}")
    return failed
