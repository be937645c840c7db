"""train-tower's command line: recipes, overrides, and the Trainer's names."""

from __future__ import annotations

import dataclasses

import pytest

from llm2clip_plugin.data.sources.base import ReadConfig
from llm2clip_plugin.stages import tower_config as recipes
from llm2clip_plugin.stages.tower_config import TRAIN_TOWER


def test_the_command_line_overrides_a_recipe():
    """Also by the names of the Trainer and of LLaVA's scripts."""
    words = "--local_rank=1 --recipe quickstart --deepspeed scripts/zero1.json --optim.lr 2e-4 --output_dir=runs/x"
    words += " --data_path a b --learning_rate 3e-4 --gradient_checkpointing True --bf16 True --vision_tower t"
    words += " --per_device_train_batch_size 4 --report_to tensorboard --dual.projection-norm False"
    config = TRAIN_TOWER.parse(words.split())
    assert config.optim.lr == 3e-4 and config.deepspeed == "scripts/zero1.json" and config.output_dir == "runs/x"
    assert config.data.path == ("a", "b") and config.tower.path == "t" and config.train.micro_batch == 4
    assert config.train.gradient_checkpointing and config.train.precision == "bf16"
    assert config.train.report_to == ("tensorboard",) and not config.dual.projection_norm
    assert config.heads == recipes.quickstart().heads
    assert TRAIN_TOWER.parse(["--bf16", "False", "--fp16=True"]).train.precision == "fp16"
    assert TRAIN_TOWER.parse(["--recipe", "openai_b16", "--bf16", "False"]).train.precision == "bf16"  # the recipe's
    assert TRAIN_TOWER.parse(["--report_to", "none"]).train.report_to == ()


def test_caption_weights_name_the_kinds_that_are_read():
    words = ["--recipe", "quickstart", "--data.caption-weights", "short=1", "long=2"]
    config = TRAIN_TOWER.parse([*words, "--data.path", "a", "b"])
    assert config.data.kind_weights == {"short": 1.0, "long": 2.0}
    assert [source.kinds for source in config.data.sources] == [("short", "long")] * 2
    alone = dataclasses.replace(config.data, read=ReadConfig())
    assert [source.kinds for source in alone.sources] == [("short", "long")] * 2  # other kinds are not drawn
    for weights in (("short=1",), ("short=1", "keywords=1")):
        with pytest.raises(ValueError, match="caption_weights"):
            dataclasses.replace(config.data, caption_weights=weights)
