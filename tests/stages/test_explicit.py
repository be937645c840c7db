"""Options that are typed win over a recipe's settings, and are refused where they would change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm2clip_plugin.options import field_types
from llm2clip_plugin.stages.llm.command import parse
from llm2clip_plugin.stages.llm.config import UNUSED as LLM_UNUSED
from llm2clip_plugin.stages.llm.config import FinetuneConfig
from llm2clip_plugin.stages.tower.command import read_command
from llm2clip_plugin.stages.tower.config import UNUSED, RunConfig


def test_an_explicit_length_wins_over_the_recipes(tmp_path: Path) -> None:
    by_epochs = read_command(["--recipe", "quickstart", "--num_train_epochs", "50"]).train  # it sets max_steps
    assert (by_epochs.num_train_epochs, by_epochs.steps(1280)) == (50, 500)
    by_steps = read_command(["--recipe", "openai_b16", "--max_steps", "7"]).train  # this one sets epochs
    assert by_steps.steps(1_000_000) == 7
    for off in ("0", "-1"):  # -1 is the Trainer's
        assert read_command(["--max_steps", off, "--num_train_epochs", "2"]).train.steps(2560) == 20
    with pytest.raises(ValueError, match=r"--num-train-epochs 2\.0 has no effect: max_steps 7 decides"):
        read_command(["--max_steps", "7", "--num_train_epochs", "2"])
    (tmp_path / "run.json").write_text(json.dumps({"config": {"train": {"max_steps": 9}}}))
    assert read_command(["--config", str(tmp_path / "run.json"), "--num_train_epochs=3"]).train.steps(40960) == 30
    assert parse(["x", "--llm", "y", "--max-steps", "7"]).train.steps(10_000) == 7


def test_an_explicit_warmup_wins_over_the_recipes() -> None:
    assert read_command(["--warmup_steps", "5"]).optim.warmup(100) == 5  # base sets a ratio
    assert read_command(["--warmup_steps", "0"]).optim.warmup(100) == 0
    assert parse(["x", "--llm", "y", "--warmup-ratio", "0.1"]).optim.warmup(100) == 10  # 300 steps by default


TOWER_REFUSED = {
    "heads": ("--recipe openai_b16 --heads.lr 1e-2", "--heads.lr 0.01 has no effect: heads.steps is 0"),
    "evaluation": ("--eval_steps 10", "--eval-steps 10 has no effect: data.validation is not set"),
    "scores": ("--evaluation.limit 10", "--evaluation.limit 10 has no effect: data.validation is not set"),
    "alpha": ("--tower.lora-alpha 64", "--lora-alpha 64 has no effect: tower.lora_rank is 0"),
    "decay": ("--tower.freeze --optim.layer-decay 0.8", "--layer-decay 0.8 has no effect: tower.freeze trains"),
    "recompute": ("--tower.freeze --gradient_checkpointing True", "--gradient-checkpointing True has no effect"),
    "lr": (
        "--tower.freeze --learning_rate 1e-3",
        "--lr 0.001 has no effect: tower.freeze trains",
    ),
    "blocks": ("--dual.adapter linear --dual.adapter-blocks 2", "--dual.adapter-blocks 2 has no effect: dual.adapter"),
    "floor": ("--optim.schedule constant --optim.min-lr-ratio 0.1", "no effect: optim.schedule constant never lowers"),
    "prefetch": (
        "--dataloader_num_workers 0 --train.dataloader-prefetch-mb 9",
        "no effect: train.dataloader_num_workers is 0",
    ),
    "folder": ("--data.path a.tar --image_folder b", "--image-folder b has no effect: data.path names no .jsonl"),
    "plan": ("--plan.images 10", "--assumed-samples 10 has no effect: it is an assumption of --dry-run"),
    "both": ("--bf16 True --fp16 True", "--bf16 and --fp16 exclude each other"),
}
LLM_REFUSED = {
    "decay": ("--layer-decay 0.8", "--layer-decay 0.8 has no effect: an adapter has one learning rate, lr"),
    "workers": ("--max-broken 0.5", "--max-broken 0.5 has no effect: it belongs to the training of towers"),
    "evaluation": ("--limit 10", "--evaluation.limit 10 has no effect: validation is not set"),
    "lora": ("--adapter a --r 8", "--lora-rank 8 has no effect: training continues from the adapter a"),
    "kinds": ("--pair-format text --pair-kinds a:b", "no effect: pair_format is text: no data set has captions"),
    "fields": ("--query-field q", "--query-field q has no effect: no data set is a .jsonl file"),
}


@pytest.mark.parametrize("name", list(TOWER_REFUSED))
def test_a_tower_option_without_effect_is_an_error(name: str) -> None:
    words, said = TOWER_REFUSED[name]
    with pytest.raises(ValueError) as error:
        read_command(words.split())
    assert said in str(error.value)


@pytest.mark.parametrize("name", list(LLM_REFUSED))
def test_an_llm_option_without_effect_is_an_error(name: str) -> None:
    words, said = LLM_REFUSED[name]
    with pytest.raises(ValueError) as error:
        parse(["data", "--llm", "x", *words.split()])
    assert said in str(error.value)


def test_what_asks_for_nothing_and_what_a_recipe_sets_is_accepted() -> None:
    read_command("--tower.freeze --optim.layer-decay 1 --eval_steps 0 --gradient_checkpointing False".split())
    read_command("--recipe openai_b16 --tower.freeze".split())  # with the recipe's layer decay and eval_steps
    read_command("--dry-run --plan.images 10 --data.validation x --eval_steps 5".split())
    parse("a.jsonl --llm x --query-field q --captions c --limit 5 --layer-decay 1".split())


def test_rules_name_fields_that_exist() -> None:
    for kind, rules in ((RunConfig, UNUSED), (FinetuneConfig, LLM_UNUSED)):
        names, config = set(field_types(kind)), kind()
        for rule in rules:
            rule.why(config)  # type: ignore[arg-type]
            for option in (*rule.options, *rule.except_for):
                assert any(name == option or name.startswith(f"{option}.") for name in names), option
