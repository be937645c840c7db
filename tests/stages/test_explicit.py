"""Options that are typed win over a recipe's settings, and are refused where they would change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm2clip_plugin.options import leaves_of
from llm2clip_plugin.stages.llm.config import FINETUNE_LLM
from llm2clip_plugin.stages.tower.config import TRAIN_TOWER


def test_an_explicit_length_wins_over_the_recipes(tmp_path: Path) -> None:
    by_epochs = TRAIN_TOWER.parse(["--recipe", "quickstart", "--num_train_epochs", "50"]).train  # it sets max_steps
    assert (by_epochs.num_train_epochs, by_epochs.steps(1280)) == (50, 500)
    by_steps = TRAIN_TOWER.parse(["--recipe", "openai_b16", "--max_steps", "7"]).train  # this one sets epochs
    assert by_steps.steps(1_000_000) == 7
    for off in ("0", "-1"):  # -1 is the Trainer's
        assert TRAIN_TOWER.parse(["--max_steps", off, "--num_train_epochs", "2"]).train.steps(2560) == 20
    (tmp_path / "run.json").write_text(json.dumps({"config": {"train": {"max_steps": 9}}}))
    assert TRAIN_TOWER.parse(["--config", str(tmp_path / "run.json"), "--num_train_epochs=3"]).train.steps(40960) == 30
    assert FINETUNE_LLM.parse(["x", "--llm", "y", "--max-steps", "7"]).train.steps(10_000) == 7


def test_an_explicit_warmup_wins_over_the_recipes() -> None:
    assert TRAIN_TOWER.parse(["--warmup_steps", "5"]).optim.warmup(100) == 5  # base sets a ratio
    assert TRAIN_TOWER.parse(["--warmup_steps", "0"]).optim.warmup(100) == 0
    assert (
        FINETUNE_LLM.parse(["x", "--llm", "y", "--warmup-ratio", "0.1"]).optim.warmup(100) == 10
    )  # 300 steps by default


@pytest.mark.parametrize(
    ("line", "option", "other"),
    [
        ("--max_steps 7 --num_train_epochs 2", "--num-train-epochs", "--max-steps"),
        ("--recipe openai_b16 --heads.lr 1e-2", "--heads.lr", "--heads.steps"),
        ("--eval_steps 10", "--eval-steps", "--validation"),
        ("--evaluation.limit 10", "--evaluation.limit", "--validation"),
        ("--tower.lora-alpha 64", "--lora-alpha", "--lora-rank"),
        ("--tower.freeze --learning_rate 1e-3", "--lr", "--freeze"),
        ("--distill.decay 0.9", "--distill.decay", "--loss.terms"),
        ("--plan.images 10", "--assumed-samples", "--dry-run"),
        ("--bf16 True --fp16 True", "--bf16", "--fp16"),
        ("--recipe base --config x.json", "--recipe", "--config"),
    ],
)
def test_a_tower_option_without_effect_is_an_error(line: str, option: str, other: str) -> None:
    with pytest.raises(ValueError, match=rf"{option} .*{other}"):
        TRAIN_TOWER.parse(line.split())


def test_an_llm_option_without_effect_is_an_error() -> None:
    for line, option, other in (
        ("--limit 10", "--evaluation.limit", "--validation"),
        ("--adapter a --r 8", "--lora-rank", "--adapter"),
        ("--layer-decay 0.8", "--layer-decay", ""),  # of towers alone
    ):
        with pytest.raises(ValueError, match=rf"{option}.*{other}"):
            FINETUNE_LLM.parse(["data", "--llm", "x", *line.split()])


def test_what_asks_for_nothing_and_what_a_recipe_sets_is_accepted() -> None:
    TRAIN_TOWER.parse("--tower.freeze --eval_steps 0 --head-lr 0 --lr 1e-3".split())
    TRAIN_TOWER.parse("--recipe openai_b16 --tower.freeze".split())  # with the recipe's lr and eval_steps
    TRAIN_TOWER.parse("--dry-run --plan.images 10 --data.validation x --eval_steps 5".split())
    FINETUNE_LLM.parse("a.jsonl --llm x --query-field q --captions c --limit 5 --adapter a --dropout 0.1".split())


def test_rules_name_fields_that_exist() -> None:
    for command in (TRAIN_TOWER, FINETUNE_LLM):
        names = [name for name, _ in leaves_of(command.settings)]
        for option in (*command.needs, *command.replaces, *command.replaces.values(), *command.hidden.split()):
            assert any(name == option or name.startswith(f"{option}.") for name in names), option
