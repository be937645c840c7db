"""CITATION.cff names the version that is installed, and the paper."""

from __future__ import annotations

from pathlib import Path

import yaml

import llm2clip_plugin

ROOT = Path(__file__).parents[2]


def test_the_version_and_the_paper():
    fields = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert fields["version"] == llm2clip_plugin.__version__
    (paper,) = fields["references"]
    assert "2411.04997" in paper["url"]
