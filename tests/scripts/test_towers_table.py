"""docs/towers.md has a line of differences for every family of towers, which one command writes."""

import dataclasses

import pytest
import torch

from llm2clip_plugin.vision.families import families
from scripts import towers_table
from scripts.towers_references import MAKERS

ROUNDING = 1e-5  # of float32, as a share of the largest value


def rows() -> list[str]:
    text = towers_table.PAGE.read_text(encoding="utf-8")
    _, _, rest = text.partition(towers_table.BEGIN)
    return rest.partition(towers_table.END)[0].strip().splitlines()


def test_every_family_has_a_reference_and_a_row():
    assert MAKERS.keys() == families().keys()
    head, dashes, *lines = rows()
    assert (head, dashes) == towers_table.HEAD
    columns = len(dataclasses.fields(towers_table.Differences)) + 2
    assert all(line.count("|") == columns + 1 for line in lines)
    assert [line.split("|")[1].strip() for line in lines] == sorted(families())


@pytest.mark.parametrize("family", ["qwen25", "internvl"])
def test_a_row_is_measured(family, tmp_path):
    reference, found = towers_table.measure(family, tmp_path)
    exact = (found.states, found.training, found.batch, found.checkpointing)
    assert max(exact) < ROUNDING
    assert 1e-4 < found.half < 0.1
    assert towers_table.row(family, reference, found).startswith(f"| {family} | trans")


def test_what_cannot_be_compared_is_not_equal():
    """The largest of 0 and NaN is 0."""
    ones = torch.ones(2, 3)
    assert towers_table.difference([ones, ones], [ones, 2 * ones]) == 0.5
    with pytest.raises(ValueError, match="not finite"):
        towers_table.difference([ones], [ones * float("nan")])
    with pytest.raises(ValueError, match=r"\(1, 3\) is compared with \(2, 3\)"):
        towers_table.difference([ones[:1]], [ones])


def test_the_table_of_a_page_is_renewed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{towers_table.BEGIN}\nold\n{towers_table.END}\nafter\n")
    towers_table.write("| new |", page)
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("before\n")
    assert "\n\n| new |\n\n" in text
    assert text.endswith("\nafter\n")
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has no lines"):
        towers_table.write("| new |", page)
