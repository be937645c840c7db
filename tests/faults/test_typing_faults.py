"""Command lines as they are mistyped on a first day: one line names the word and what was meant; nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from faults import Fault, World, matches, meet, rows

from llm2clip_plugin.cli import COMMANDS, main

QUESTIONS = "--question-file {w}/questions.jsonl --answers-file {w}/answers.jsonl"
NO_SCORES = "{w}/data has no score files; `llm2clip score BENCHMARK DATA --answers FILE --output FILE` writes them"
TRAIN = "train-tower {w}/data --tower {w}/tower --output {w}/new"


@rows(
    Fault("command", "trian-tower", "unknown command 'trian-tower'; did you mean 'train-tower'? known: ..."),
    Fault("command of a group", "data chekc {w}/data", "unknown command 'data chekc'; did you mean 'data check'? ..."),
    Fault(
        "command below a command",
        "evaluate zerosht {w}/tower",
        "unknown command 'evaluate zerosht'; did you mean 'evaluate zeroshot'? known: ...",
    ),
    Fault(
        "data that is not there",
        "train-tower nowhere --tower {w}/tower --output {w}/new",
        "no data at nowhere; expected ...",
    ),
    Fault(
        "LLM that is not there", "embed {w}/data --llm ./nowhere --cache {w}/new", "no LLM at ./nowhere; expected ..."
    ),
    Fault(
        "LLM to fine-tune that is not there",
        "finetune-llm {w}/data --llm ./nowhere --global-batch 16 --output {w}/new",
        "no LLM at ./nowhere; ...",
    ),
    Fault("no tower", "train-tower --data {w}/data", "no tower to train: add --tower with a directory or Hub id. ..."),
    Fault(
        "recipe",
        "train-tower {w}/data --recipe proclip_b17",
        "unknown recipe 'proclip_b17'; did you mean 'proclip_b...",
    ),
    Fault("loss term", TRAIN + " --loss.terms infonse=1", "unknown loss term 'infonse'; did you mean 'infonce'? ..."),
    Fault(
        "misspelled option while another is missing",
        "export {w}/new --ouput {w}/x",
        "unknown option --ouput; did you mean --output? ...",
    ),
    Fault("flag with no-", TRAIN + " --loss.no-mask-same-imgae", "...did you mean --loss.no-mask-same-image? ..."),
    Fault("recipe's option", TRAIN + " --recpie base", "unknown option --recpie; did you mean --recipe? ..."),
    Fault("tower of evaluate", "evaluate retreival {w}/data", "retreival is not a directory or a Hub id ..."),
    Fault("data of evaluate", "evaluate {w}/tower", "missing DATA; usage: llm2clip evaluate TOWER DATA [options]"),
    Fault("run", "status nowhere", "no folder nowhere"),
    Fault("tower of search", "search nowhere --data {w}/data bird", "nowhere is not a directory or a Hub id ..."),
    Fault("text of search", "search {w}/tower {w}/data", "no text to search for; usage: ..."),
    Fault(
        "search with a tower without heads",
        "search {w}/tower {w}/data bird",
        "{w}/tower is a vision tower without the projection and text adapter that are needed ...",
    ),
    Fault("scores of a plan", "compare --plan {w}/data", NO_SCORES),
    Fault("scores", "compare {w}/data {w}/tower --output {w}/new", NO_SCORES),
    Fault("checkpoint to export", "llava export nowhere --format hf --output {w}/new", "nowhere is not a folder; ..."),
    Fault("checkpoint to bundle", "llava bundle nowhere", "nowhere is not a LLaVA checkpoint: no config.json in it"),
    Fault(
        "checkpoint to ask",
        f"llava evaluate --model-path ./nowhere {QUESTIONS}",
        "--model-path ./nowhere is neither ...",
    ),
    Fault(
        "server that does not run",
        f"llava evaluate --endpoint http://127.0.0.1:1/v1 --retries 0 {QUESTIONS}",
        "http://127.0.0.1:1/v1: ConnectionRefusedError: ...; start the server, or correct --endpoint",
    ),
    Fault(
        "benchmark",
        "score pop {w}/data --answers {w}/questions.jsonl",
        "unknown benchmark 'pop'; did you mean 'pope'? ...",
    ),
)
def test_mistyped(
    fault: Fault, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world.path("questions.jsonl").write_text(json.dumps({"question_id": 1, "text": "What?"}) + "\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("LLM2CLIP_HOME", str(tmp_path / "home"))
    before = {path for path in world.folder.rglob("*") if ".llm2clip" not in path.parts and path.suffix != ".index"}
    told = meet(fault, world, fault.words.replace("{w}", str(world.folder)).split(), capsys)
    assert told.count("error: ") == 1
    assert not [*(tmp_path / "here").iterdir()]
    after = {path for path in world.folder.rglob("*") if ".llm2clip" not in path.parts and path.suffix != ".index"}
    assert after == before


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("status", "use", "towers", "doctor")])
def test_every_command_names_the_option_that_was_meant(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    others = {"llava bundle": "--overwrite", "data check": "--workers", "llava evaluate": "--answers-file"}
    meant = {**others, "embed": "--cache"}.get(name, "--output")
    status = main([*name.split(), meant[:-2] + meant[-1] + meant[-2], "1"])
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and matches(f"error: unknown option ...; did you mean {meant}? ...", line, World(Path("/")))
