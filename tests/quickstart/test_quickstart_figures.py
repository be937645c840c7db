"""The page's figures: curves from metrics.jsonl, a map of names, and their drawing in a browser of a phone's width."""

from __future__ import annotations

import json
import re

import charts
import chromium
import embedding_map
import pytest
import torch
from page import Section, Table, page_html

from llm2clip_plugin import pages as curves


def write_run(folder, lines) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def runs(tmp_path):
    """data/ with one adapter's run, output/ with three towers'."""
    steps = [{"step": step, "loss": 3 - step / 10} for step in (1, 2, 3)]
    write_run(tmp_path / "data/llm/seed0", [*steps, *({"step": s, "short->keywords": s / 10} for s in (0, 3))])
    for name in ("raw-seed0", "raw-seed1", "tuned-seed0", "shuffled-seed0"):
        heads = [{"step": 0, "event": "heads", "heads_loss": 9.0}]
        scores = [{"step": step, "i2t_r10": step / 10, "t2i_r10": 0.2} for step in (0, 3)]
        write_run(tmp_path / "output/runs" / name, [*heads, *steps, *scores, {"step": 3, "event": "checkpoint"}])
    return tmp_path


def test_curves_are_those_of_every_training(runs) -> None:
    found = charts.training_charts(runs / "data", runs / "output")
    assert [len(chart.lines) for chart in found] == [1, 1, 3, 3]  # no control
    assert found[0].lines[0].points == [(1, 2.9), (2, 2.8), (3, 2.7)]
    assert found[1].lines[0].points == [(0, 0), (3, 0.3)]
    assert found[3].lines[0].points == [(0, pytest.approx(0.1)), (3, pytest.approx(0.25))]  # mean of both directions
    assert [line.side for line in found[3].lines] == ["raw", "raw", "tuned"]
    side, path = next(iter(found[1].paths()))
    assert side == "tuned" and path.startswith(f"M{curves.LEFT:.1f},{curves.HEIGHT - curves.BOTTOM:.1f} L314.0,")


def test_runs_without_validation_and_cut_lines_are_drawn(tmp_path) -> None:
    write_run(tmp_path / "output/runs/raw-seed0", [{"step": step, "loss": 1.0} for step in (1, 2)])
    with (tmp_path / "output/runs/raw-seed0/metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # killed while writing
    (chart,) = charts.training_charts(tmp_path / "data", tmp_path / "output")
    assert chart.title == "Stage 2: loss of the tower" and chart.last == 2
    assert charts.training_charts(tmp_path / "none", tmp_path / "none") == []


@pytest.mark.parametrize(("largest", "expected"), [(3.2, [0, 2, 4]), (0.5, [0, 0.2, 0.4, 0.6]), (12, [0, 5, 10, 15])])
def test_axes_have_round_numbers(largest: float, expected: list[float]) -> None:
    assert curves.ticks(largest) == pytest.approx(expected)


def names(concept_share: float) -> embedding_map.Rows:
    """Names of 8 concepts in 3 languages: a direction of the concept, and one of the language."""
    rows: embedding_map.Rows = {}
    for number, language in enumerate(("de", "en", "zh")):
        for concept in range(8):
            vector = torch.zeros(12)
            vector[concept], vector[8 + number] = concept_share, 1 - concept_share
            rows.setdefault(("short", language), {})[f"c{concept}"] = vector
    return rows


def test_the_map_tells_languages_from_concepts() -> None:
    titles = {"raw": "as it is", "tuned-seed0": "fine-tuned"}
    maps = embedding_map.draw_maps({"raw": names(0.1), "tuned-seed0": names(0.9)}, titles)
    assert maps is not None and maps.languages == ["de", "en", "zh"]
    by_language, by_concept = maps.maps
    assert (by_language.same_language, by_language.same_concept) == (1, 0)
    assert (by_concept.same_language, by_concept.same_concept) == (0, 1)
    assert len(by_language.dots) == 24 and all(
        0 <= value <= embedding_map.SIDE for dot in by_language.dots for value in dot[:2]
    )
    # three clumps: names of one language lie together
    places = {number: {dot[:2] for dot in by_language.dots if dot[2] == number} for number in range(3)}
    spread = max(max(abs(x - y) for x in xs for y in xs) for xs in ([x for x, _ in p] for p in places.values()))
    assert spread < embedding_map.SIDE / 4
    assert by_language.variance > 0.9
    assert embedding_map.draw_maps({"raw": {("short", "en"): names(0.5)["short", "en"]}}, titles) is None


def test_variance_is_that_of_two_axes() -> None:
    rows = torch.diag(torch.tensor([3.0, 2.0, 1.0])).repeat_interleave(2, 0) * torch.tensor([1, -1] * 3)[:, None]
    places, share = embedding_map.principal_components(rows)
    assert share == pytest.approx((9 + 4) / (9 + 4 + 1))
    assert places.abs().max(0).values.tolist() == pytest.approx([3, 2])


def page(runs) -> str:
    maps = embedding_map.draw_maps({"raw": names(0.1), "tuned-seed0": names(0.9)}, {"raw": "as it is"})
    wide = Table(
        head=["a long name of a column"] * 6, rows=[["tower: " * 12, *["+.052 [+.043, +.061]"] * 5]], below="w " * 90
    )
    section = Section(
        title="s", sentences=["t " * 90], lists={"shown": ["x"], "NOT": []}, words="w", tables=[wide], queries=[]
    )
    figures = {"maps": maps, "charts": charts.training_charts(runs / "data", runs / "output"), "sections": [section]}
    return page_html("title", "intro", ["headline " * 30], [], [wide], [], **figures)


def test_figures_are_on_the_page(runs) -> None:
    text = page(runs)
    assert text.count("<svg") == 5 and text.count("<circle") == 24 and text.count('class="line raw"') == 4
    assert "of the same language for 100 %" in text and "<li>none</li>" in text
    assert not re.search(r"https?://|<script", text)


@pytest.mark.skipif(chromium.find() is None, reason="no Chromium here: apt-get install chromium, then this test runs")
def test_the_page_fits_a_phone(runs) -> None:
    (runs / "index.html").write_text(page(runs), encoding="utf-8")
    with chromium.Chromium() as browser:
        browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
        browser.open((runs / "index.html").as_uri())
        assert browser.run("document.documentElement.scrollWidth") <= 390 and browser.errors == []
        inner = (
            "[...document.querySelectorAll('td, caption, svg, p')].every(e => e.getBoundingClientRect().right <= 390)"
        )
        assert browser.run(inner)  # nothing to scroll sideways, tables either
        assert browser.run(
            "getComputedStyle(document.querySelector('td:nth-child(2)'), '::before').content"
        ).startswith('"a long')
        colors = "new Set([...document.querySelectorAll('circle')].map(e => getComputedStyle(e).fill)).size"
        assert browser.run(colors) == 3
        assert browser.requests == [(runs / "index.html").as_uri()]
