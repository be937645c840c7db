"""The rank correlation of forecasts with LLaVAs: closed-form values, and score files in, lines out."""

from pathlib import Path

import pytest
from correlation import correlation, main

from llm2clip_plugin.contracts import ScoreFile


def test_spearman_and_its_interval():
    value, low, high = correlation([1, 2, 3, 4], [2, 1, 4, 3])
    assert value == pytest.approx(1 - 6 * 4 / (4 * 15)) and low < value < high
    assert correlation([0.1, 0.2, 0.3, 0.5, 0.9], [1, 4, 9, 16, 25]) == pytest.approx((1, 1, 1))
    with pytest.raises(ValueError, match="at least 4 towers"):
        correlation([1, 2, 3], [1, 2, 3])


def test_several_llavas_of_a_tower_are_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def write(name: str, **metrics: float) -> str:
        return str(ScoreFile(benchmark=name, metrics=metrics, items=[]).write(tmp_path / f"{name}.json"))

    words = []
    for tower, (neighbors, llavas) in enumerate([(0.1, (9, 1)), (0.2, (6,)), (0.3, (7,)), (0.4, (8,))]):
        files = [write(f"llava-{tower}-{seed}", accuracy=score) for seed, score in enumerate(llavas)]
        words.append(f"{write(f'forecast-{tower}', neighbors=neighbors, CKA=-neighbors)}={','.join(files)}")
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["neighbors", "+1.00"], ["CKA", "-1.00"]]
