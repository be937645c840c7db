"""train-tower's command line: recipes, overrides, and the Trainer's names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tiny_data import make_tower

from llm2clip_plugin import cli
from llm2clip_plugin.data.sources.base import ReadConfig
from llm2clip_plugin.stages.tower import config as recipes
from llm2clip_plugin.stages.tower.config import TRAIN_TOWER, DataConfig
from llm2clip_plugin.train.config import TowerConfig


def test_the_command_line_overrides_a_recipe():
    argv = ["--local_rank=1", "--recipe", "quickstart", "--deepspeed", "scripts/zero1.json", "--optim.lr", "2e-4"]
    argv += [
        "--output_dir=runs/x",
        "--data_path",
        "a",
        "b",
        "--learning_rate",
        "3e-4",
        "--gradient_checkpointing",
        "True",
    ]
    argv += [
        "--bf16",
        "True",
        "--vision_tower",
        "t",
        "--per_device_train_batch_size",
        "4",
        "--report_to",
        "tensorboard",
    ]
    argv += ["--dual.projection-norm", "False"]
    config = TRAIN_TOWER.parse(argv)
    assert config.optim.lr == 3e-4 and config.deepspeed == "scripts/zero1.json" and config.output_dir == "runs/x"
    assert config.data.path == ("a", "b") and config.tower.path == "t" and config.train.micro_batch == 4
    assert config.train.gradient_checkpointing and config.train.precision == "bf16"
    assert config.train.report_to == ("tensorboard",) and not config.dual.projection_norm
    assert config.heads == recipes.quickstart().heads


def test_names_of_llava_s_scripts():
    assert TRAIN_TOWER.parse(["--bf16", "False", "--fp16=True"]).train.precision == "fp16"
    assert TRAIN_TOWER.parse(["--recipe", "openai_b16", "--bf16", "False"]).train.precision == "bf16"  # the recipe's
    assert not TRAIN_TOWER.parse(["--torch_compile", "False"]).train.torch_compile
    silent = TRAIN_TOWER.parse(["--report_to", "none", "--seed", "7"])
    assert silent.train.report_to == () and silent.train.seed == 7
    assert TRAIN_TOWER.parse(["--learning_rate", "1e-4"]).optim.lr == 1e-4


def test_caption_weights_name_the_kinds_that_are_read():
    words = ["--recipe", "quickstart", "--data.caption-weights", "short=1", "long=2"]
    config = TRAIN_TOWER.parse([*words, "--data.path", "a", "b"])
    assert config.data.kind_weights == {"short": 1.0, "long": 2.0}
    assert [source.kinds for source in config.data.sources] == [("short", "long")] * 2
    alone = dataclasses.replace(config.data, read=ReadConfig())
    assert [source.kinds for source in alone.sources] == [("short", "long")] * 2  # other kinds are not drawn
    with pytest.raises(ValueError, match="name different kinds; give each of these kinds a weight"):
        dataclasses.replace(config.data, caption_weights=("short=1",))
    with pytest.raises(ValueError, match=r"data\.caption_weights short=1 keywords=1"):
        TRAIN_TOWER.parse([*words[:-1], "keywords=1"])


def test_without_a_recipe_it_is_base_for_any_data_and_tower(capsys: pytest.CaptureFixture[str]):
    config = TRAIN_TOWER.parse(["--data.path", "x", "--tower.path", "y"])
    assert config == dataclasses.replace(recipes.base(), data=DataConfig(path=("x",)), tower=TowerConfig(path="y"))
    assert not config.data.augment.flip and not config.data.augment.rotate and not config.evaluation.group
    assert config.heads.steps and config.train.save_total_limit == recipes.quickstart().train.save_total_limit == 2
    assert cli.main(["train-tower", "--data.path", "docs"]) == 2
    said = capsys.readouterr().err
    assert "error: no tower to train: add --tower with a directory or Hub id. For example: llm2clip train" in said
    assert cli.main(["train-tower", "--recipe", "eva02_b16"]) == 2
    said = capsys.readouterr().err
    assert "no training data: add DATA and no tower to train (eva02-b16, as llm2clip import writes" in said


def test_the_recipe_that_was_not_named_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--tower.path", str(make_tower(tmp_path / "tower")), "--dry-run"]
    assert cli.main(["train-tower", *words]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "recipe: base (the paper's settings for any data and tower; --recipe NAME chooses another)"
    assert cli.main(["train-tower", "--recipe=base", *words]) == 0
    assert "recipe: " not in capsys.readouterr().out
