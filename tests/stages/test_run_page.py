"""llm2clip run: the queries that the page shows."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm2clip_plugin.data.samples import BrokenSample, Caption
from llm2clip_plugin.evaluate.features import EmbeddedPairs
from llm2clip_plugin.stages import run_page
from llm2clip_plugin.stages.rerun import Stage

IMAGES = 6


def pairs(ranks: list[int]) -> EmbeddedPairs:
    """A caption for each image, which finds it at this place."""
    text_MD = torch.eye(IMAGES)
    image_ND = torch.eye(IMAGES)
    for caption, rank in enumerate(ranks):
        others = [image for image in range(IMAGES) if image != caption]
        for image in others[: rank - 1]:
            image_ND[image, caption] = 2.0
    # of one length
    image_ND = torch.cat(
        [image_ND, (10 - image_ND.square().sum(1, keepdim=True)).sqrt()], dim=1
    )
    text_MD = torch.cat([text_MD, torch.zeros(IMAGES, 1)], dim=1)
    captions = [Caption(f"caption {number}") for number in range(IMAGES)]
    about: dict[str, Any] = {
        "keys": [str(number) for number in range(IMAGES)],
        "meta": [{}] * IMAGES,
        "broken": [],
    }
    owners = torch.arange(IMAGES)
    return EmbeddedPairs(
        image_ND=image_ND, text_MD=text_MD, owner_M=owners, captions=captions, **about
    )


class NoPictures:
    def __getitem__(self, number: int):
        raise BrokenSample("shard", str(number), "no picture")


BEFORE = [1, 2, 1, 2, 1, 1]
AFTER = [1, 1, 1, 1, 1, 2]


def test_the_first_pictures_are_the_most_similar():
    sides = {"before": pairs(BEFORE), "after": pairs(AFTER)}
    for side in sides.values():
        side.numbers.extend(range(IMAGES))
    queries = run_page.draw(NoPictures(), sides)
    assert [query["text"] for query in queries] == [
        f"caption {number}" for number in range(IMAGES)
    ]
    assert [query["place"] for query in queries] == [
        {"before": before, "after": after}
        for before, after in zip(BEFORE, AFTER, strict=True)
    ]
    for query in queries:
        for side, rank in query["place"].items():
            assert [right for _, right in query["found"][side]].index(True) + 1 == rank


def test_won_are_those_that_are_found_earlier_after_stage_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rendered: dict[str, Any] = {}
    queries = [
        {"place": {"before": b, "after": a}} for b, a in zip(BEFORE, AFTER, strict=True)
    ]
    measured = (None, SimpleNamespace(pairs=pairs(BEFORE)))
    monkeypatch.setattr(run_page, "measure_pairs", lambda _: measured)
    monkeypatch.setattr(run_page, "held_out_config", lambda *_: None)
    monkeypatch.setattr(run_page, "open_source", lambda _: None)
    monkeypatch.setattr(run_page, "draw", lambda *_: queries)
    monkeypatch.setattr(run_page, "EvaluateConfig", SimpleNamespace)
    monkeypatch.setattr(
        run_page, "render", lambda _, **values: rendered.update(values) or "page"
    )
    config: Any = SimpleNamespace(
        output=str(tmp_path), path="data", tower="tower", llm="llm"
    )
    page = run_page.write_page(config, None, [], {})
    assert page.read_text() == "page"
    assert (rendered["won"], rendered["lost"], rendered["images"]) == (2, 1, IMAGES)


def test_commands_are_those_that_a_shell_reads():
    stage = Stage(name="check", words=("llm2clip", "data", "check", "my photos"))
    assert run_page.listed(stage, {"check": 2.0}) == (
        "check",
        2.0,
        "llm2clip data check 'my photos'",
    )
