"""The page of ``evaluate drift`` in a browser of a phone's width."""

from __future__ import annotations

from pathlib import Path

import chromium
import pytest

from llm2clip_plugin.bootstrap import Interval
from llm2clip_plugin.evaluate.drift_compare import Change, ChangedImage, ClassChange, Drift
from llm2clip_plugin.evaluate.drift_page import drift_page
from llm2clip_plugin.evaluate.options.drift import DriftConfig

LONG = "runs/openai-clip-vit-large-patch14-336-llm2clip/seed0/checkpoints/step-00012000/tower"


def page() -> str:
    """Long paths, long names of classes, every table, pictures that cannot be read."""
    measured = Interval(mean=0.0123, low=-0.0012, high=0.0234, level=0.95, clusters=50_000)
    changes = [
        Change(
            measure=name, before=0.7571, after=0.7694, difference=measured, kept=36_412, lost=1_443, gained=2_058,
            neither=10_087, scores={},
        )
        for name in ("zero-shot", "kNN", "linear", "image to text", "text to image")
    ]  # fmt: skip
    names = ["tench", "soft-coated wheaten terrier", "Pneumonoultramicroscopicsilicovolcanoconiosis"]
    classes = [ClassChange(name=name, images=50, before=40, after=30, kept=29, lost=11, gained=1) for name in names]
    changed = [
        ChangedImage(key=f"{LONG}/{n}.jpg", truth=names[n % 3], before=names[1], after=names[2], gained=n % 2 == 0)
        for n in range(12)
    ]
    drift = Drift(
        changes=changes, classes=classes, changed=changed,
        cka=[("embeddings", 0.99), *((f"block {n}", 1 - n / 30) for n in range(1, 25)), ("image feature", 0.31)],
        texts=(f"the text tower of {LONG}", f"the LLM {LONG}"), notes=[f"{LONG} has no text adapter. " * 2],
        hashes=("", ""), labeled=None,
    )  # fmt: skip
    return drift_page(DriftConfig(before=LONG, after=f"{LONG}-after", data=LONG, captions=LONG, clip=LONG), drift)


@pytest.mark.skipif(chromium.find() is None, reason="no Chromium here: apt-get install chromium, then this test runs")
def test_the_page_fits_a_phone(tmp_path: Path) -> None:
    """No sideways scrolling of the page; every column of every table is on the screen, and names are not torn."""
    path = tmp_path / "drift.html"
    path.write_text(page(), encoding="utf-8")
    with chromium.Chromium() as browser:
        browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
        browser.open(path.as_uri())
        assert browser.run("document.documentElement.scrollWidth") <= 390 and browser.errors == []
        texts = "[...document.querySelectorAll('h1, p, td, figcaption, bdi')]"
        outside = f"{texts}.filter(e => e.getBoundingClientRect().right > 390).map(e => e.textContent)"
        assert browser.run(outside) == []
        label = "getComputedStyle(document.querySelector('.wide td:nth-child(5)'), '::before').content"
        assert browser.run(label) == '"95 % interval"'
        names = (
            "Math.min(...[...document.querySelectorAll('td:first-child')].map(e => e.getBoundingClientRect().width))"
        )
        assert browser.run(names) >= 60
        assert browser.requests == [path.as_uri()]
