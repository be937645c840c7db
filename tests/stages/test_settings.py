"""Settings from JSON: misspelt and mistyped fields, hashes, what may change on resume."""

from __future__ import annotations

import dataclasses
import json

import pytest

from llm2clip_plugin.files import from_plain
from llm2clip_plugin.stages.settings import refuse_changes
from llm2clip_plugin.stages.tower import config as recipes
from llm2clip_plugin.stages.tower.config import RECIPES, RunConfig, recipe


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"optim": {"learning_rat": 1}}, r"x.json: optim .*'learning_rat'.* known: .*lr"),
        ({"train": {"global_batch": "8"}}, r"x.json: train: global_batch is '8', expected int"),
        ({"optim": {"betas": [0.9]}}, "x.json: optim: betas"),
        ({"optim": {"schedule": "cosin"}}, "x.json: optim: schedule is 'cosin'"),
        ([], "x.json"),
    ],
)
def test_a_wrong_field_of_a_file_is_named(body: object, named: str):
    with pytest.raises(ValueError, match=named):
        from_plain(RunConfig, body, where="x.json")


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
