"""Settings from JSON: misspelt and mistyped fields, hashes, what may change on resume."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from llm2clip_plugin.stages.llm.command import parse
from llm2clip_plugin.stages.settings import from_plain, refuse_changes
from llm2clip_plugin.stages.tower import config as recipes
from llm2clip_plugin.stages.tower.command import read_command
from llm2clip_plugin.stages.tower.config import RECIPES, RunConfig, recipe


def test_a_misspelled_option_is_refused():
    with pytest.raises(ValueError, match=r"unknown option 'optim.learning_rat'; "):
        from_plain(RunConfig, {"optim": {"learning_rat": 1}}, where="x.json")
    with pytest.raises(ValueError, match=r"unknown option 'train.global_bach'; did you mean 'global_batch'\?"):
        from_plain(RunConfig, {"train": {"global_bach": 1}}, where="x.json")
    with pytest.raises(ValueError, match=r"train.global_batch is '8'; expected <class 'int'>"):
        from_plain(RunConfig, {"train": {"global_batch": "8"}}, where="x.json")
    with pytest.raises(ValueError, match=r"unknown option --train.global-bach; did you mean --global-batch"):
        read_command(["--recipe", "quickstart", "--train.global-bach", "8"])
    with pytest.raises(
        ValueError, match=r"unknown recipe 'quickstrat'; did you mean 'quickstart'\?.* known: base, quickstart"
    ):
        read_command(["--recipe", "quickstrat"])


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_survive_json(name: str):
    config = recipe(name)
    again = from_plain(RunConfig, json.loads(json.dumps(dataclasses.asdict(config))), where=name)
    assert again == config and again.hash == config.hash


def test_the_hash_sees_what_is_learned_alone():
    config = recipes.quickstart()
    moved = dataclasses.replace(config, output_dir="elsewhere", deepspeed="zero3.json", resume="never")
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e-3))
    assert moved.hash == config.hash != other.hash


def test_changed_settings_are_named_and_can_be_allowed():
    saved = json.loads(json.dumps(dataclasses.asdict(recipes.quickstart())))
    now = dataclasses.asdict(recipes.quickstart())
    refuse_changes(saved, {**now, "output_dir": "x"}, (), where="run")
    now["optim"]["lr"] = 1e-3
    with pytest.raises(
        ValueError, match=r"optim.lr: 0.0004 in the checkpoint, 0.001 in this run(.|\n)*--allow-changed optim.lr"
    ):
        refuse_changes(saved, now, (), where="run")
    refuse_changes(saved, now, ("optim.lr",), where="run")
    refuse_changes(saved, now, ("optim",), where="run")
    with pytest.raises(ValueError, match=r"unknown field 'optim.lrr' in --allow-changed; did you mean 'optim.lr'"):
        refuse_changes(saved, now, ("optim.lrr",), where="run")


def test_an_explicit_length_or_warmup_wins_over_the_recipes(tmp_path: Path) -> None:
    by_epochs = read_command(["--recipe", "quickstart", "--num_train_epochs", "50"]).train  # it sets max_steps
    assert (by_epochs.num_train_epochs, by_epochs.steps(1280)) == (50, 500)
    assert read_command(["--recipe", "openai_b16", "--max_steps", "7"]).train.steps(1_000_000) == 7  # it sets epochs
    for off in ("0", "-1"):  # -1 is the Trainer's
        assert read_command(["--max_steps", off, "--num_train_epochs", "2"]).train.steps(2560) == 20
    (tmp_path / "run.json").write_text(json.dumps({"config": {"train": {"max_steps": 9}}}))
    assert read_command(["--config", str(tmp_path / "run.json"), "--num_train_epochs=3"]).train.steps(40960) == 30
    assert parse(["x", "--llm", "y", "--max-steps", "7"]).train.steps(10_000) == 7
    assert read_command(["--warmup_steps", "5"]).optim.warmup(100) == 5  # base sets a ratio
    assert read_command(["--warmup_steps", "0"]).optim.warmup(100) == 0
    assert parse(["x", "--llm", "y", "--warmup-ratio", "0.1"]).optim.warmup(100) == 10  # 300 steps by default
