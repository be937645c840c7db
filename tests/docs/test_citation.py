"""CITATION.cff: what GitHub and Zotero read, and that it names the version that is installed."""

from __future__ import annotations

from pathlib import Path

import yaml

import llm2clip_plugin

ROOT = Path(__file__).parents[2]


def test_the_citation_has_what_the_format_requires():
    fields = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    required = {"cff-version", "message", "title", "authors"}
    assert required <= set(fields) and fields["cff-version"] == "1.2.0"
    assert fields["version"] == llm2clip_plugin.__version__
    (paper,) = fields["references"]
    assert {"type", "title", "authors"} <= set(paper) and "2411.04997" in paper["url"]
    assert all({"family-names", "given-names"} <= set(author) for author in paper["authors"])
