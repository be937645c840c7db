"""Progress bars: lines where stderr is not a terminal, a bar where it is, silence on other ranks."""

import re
import sys

import pytest

from llm2clip_plugin import console as progress
from llm2clip_plugin.console import progress_bar, track


def test_a_job_off_a_terminal_prints_lines_with_rate_and_time_left(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with progress_bar(total=4, label="embed", unit="captions", initial=1, delay=0) as bar:
        bar.update(2)
        bar.set_postfix_str("loss 0.5", refresh=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("embed: 1/4 captions, ")
    assert re.fullmatch(r"embed: 3/4 captions, +[\d.]+ captions/s, \d\d:\d\d left, loss 0\.5", lines[-1])
    assert not any("\r" in line or "\x1b" in line or not line.strip() for line in lines)


def test_a_terminal_gets_one_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert sum(track(range(100), total=100, label="heads", unit="steps")) == 4950
    drawn = capsys.readouterr().err
    assert "100/100 steps" in drawn and "steps/s" in drawn and "heads: 100%" in drawn
    assert drawn.count("\n") == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_a_rank_that_does_not_show_is_silent(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert list(track("ab", total=2, label="images", unit="batches", show=False)) == ["a", "b"]
    assert capsys.readouterr().err == ""
