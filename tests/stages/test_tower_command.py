"""train-tower's command line: recipes, overrides, and the Trainer's names."""

from __future__ import annotations

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
    for words, expected in (("", "auto"), ("=auto", "auto"), (" false", False), ("", True)):
        given = f"--gradient-checkpointing{words}".split() if (words, expected) != ("", "auto") else []
        assert TRAIN_TOWER.parse(["--recipe", "openai_b16", *given]).train.gradient_checkpointing == expected
    assert TRAIN_TOWER.parse(["--no-gradient-checkpointing"]).train.gradient_checkpointing is False
    assert TRAIN_TOWER.parse(["--bf16", "False", "--fp16=True"]).train.precision == "fp16"
    assert TRAIN_TOWER.parse(["--recipe", "openai_b16", "--bf16", "False"]).train.precision == "bf16"  # the recipe's
    assert TRAIN_TOWER.parse(["--report_to", "none"]).train.report_to == ()
