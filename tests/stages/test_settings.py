"""Settings: recipes through JSON and the command line, hashes, what may change on resume, options
without effect."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from llm2clip_plugin.json_files import from_plain
from llm2clip_plugin.options import Command, leaves_of
from llm2clip_plugin.stages import tower_config as recipes
from llm2clip_plugin.stages.llm_config import FINETUNE_LLM, FinetuneConfig
from llm2clip_plugin.stages.resume import refuse_changes, same_on_all_hosts
from llm2clip_plugin.stages.tower_config import RECIPES, TRAIN_TOWER, RunConfig, recipe
from llm2clip_plugin.stages.training import main_tower


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_survive_json(name: str):
    config = recipe(name)
    again = from_plain(
        RunConfig, json.loads(json.dumps(dataclasses.asdict(config))), where=name
    )
    assert again == config
    assert again.hash == config.hash


def test_a_recipe_is_said_to_be_of_those_who_made_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    groups = recipes.recipes_text().split("; ")
    whose = {}
    for name in RECIPES:
        [group] = [group for group in groups if name in re.split(r"[ ,:]+", group)]
        whose[name] = group
    assert "ours" in whose["base"] and "ours" in whose["quickstart"]
    assert "does not use" in whose["eva02_bige14"]
    assert whose["proclip_b16"].startswith("ProCLIP's: ")
    assert whose["lift_b16"].startswith("LIFT's: ")
    papers = {
        name
        for name, group in whose.items()
        if group.startswith("the LLM2CLIP paper's: ")
    }
    of_the_paper = {
        name for name in RECIPES if name.startswith(("openai_", "eva02_", "siglip2_"))
    }
    assert papers == of_the_paper - {"eva02_bige14"}
    with pytest.raises(ValueError, match="no tower to plan for"):
        main_tower(["--dry-run"])
    assert capsys.readouterr().out.startswith(
        "recipe: base (ours, for any data and tower; "
    )


def test_the_hash_sees_what_is_learned_alone():
    config = recipes.quickstart()
    moved = dataclasses.replace(
        config, output_dir="elsewhere", deepspeed="zero3.json", resume="never"
    )
    other = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, lr=1e-3)
    )
    assert moved.hash == config.hash != other.hash


def test_changed_settings_are_named_and_can_be_allowed():
    saved = json.loads(json.dumps(dataclasses.asdict(recipes.quickstart())))
    now = dataclasses.asdict(recipes.quickstart())
    refuse_changes(RunConfig, saved, {**now, "output_dir": "x"}, (), where="run")
    now["optim"]["lr"] = 1e-3
    with pytest.raises(
        ValueError,
        match=(
            r"optim.lr: 0.0004 in the checkpoint, 0.001 in this run"
            r"(.|\n)*--allow-changed optim.lr"
        ),
    ):
        refuse_changes(RunConfig, saved, now, (), where="run")
    refuse_changes(RunConfig, saved, now, ("optim.lr",), where="run")
    refuse_changes(RunConfig, saved, now, ("optim",), where="run")
    with pytest.raises(ValueError, match=r"--allow-changed optim.lrr"):
        refuse_changes(RunConfig, saved, now, ("optim.lrr",), where="run")


def test_an_explicit_length_or_warmup_wins_over_the_recipes(tmp_path: Path) -> None:
    # it sets max_steps
    by_epochs = TRAIN_TOWER.parse(
        ["--recipe", "quickstart", "--num_train_epochs", "50"]
    ).train
    assert by_epochs.num_train_epochs == 50
    assert by_epochs.steps(1280) == 500
    # it sets epochs
    by_steps = TRAIN_TOWER.parse(["--recipe", "openai_b16", "--max_steps", "7"]).train
    assert by_steps.steps(1_000_000) == 7
    for off in ("0", "-1"):  # -1 is the Trainer's
        assert (
            TRAIN_TOWER.parse(
                ["--max_steps", off, "--num_train_epochs", "2"]
            ).train.steps(2560)
            == 20
        )
    (tmp_path / "run.json").write_text(
        json.dumps({"config": {"train": {"max_steps": 9}}})
    )
    assert (
        TRAIN_TOWER.parse(
            ["--config", str(tmp_path / "run.json"), "--num_train_epochs=3"]
        ).train.steps(40960)
        == 30
    )
    assert (
        FINETUNE_LLM.parse(["x", "--llm", "y", "--max-steps", "7"]).train.steps(10_000)
        == 7
    )
    # base sets a ratio
    assert TRAIN_TOWER.parse(["--warmup_steps", "5"]).optim.warmup(100) == 5
    assert TRAIN_TOWER.parse(["--warmup_steps", "0"]).optim.warmup(100) == 0
    # default: 300
    assert (
        FINETUNE_LLM.parse(["x", "--llm", "y", "--warmup-ratio", "0.1"]).optim.warmup(
            100
        )
        == 10
    )


def test_the_home_folder_in_a_file_of_settings_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    body = {
        "output_dir": "~/run",
        "data": {"path": ["~/*.tar"], "read": {"images": "a/~/b"}},
    }
    (tmp_path / "settings.json").write_text(json.dumps(body))
    config = TRAIN_TOWER.parse(["--config", str(tmp_path / "settings.json")])
    assert config.output_dir == f"{tmp_path}/run"
    assert config.data.path == (f"{tmp_path}/*.tar",)
    assert config.data.read.images == "a/~/b"


@pytest.mark.parametrize("kind", [RunConfig, FinetuneConfig])
def test_every_setting_of_a_training_declares_whether_it_decides_what_is_learned(
    kind: type,
) -> None:
    undeclared = [
        name for name, leaf in leaves_of(kind) if leaf.setting.learned is None
    ]
    assert not undeclared, f"declare setting(..., learned=True or False): {undeclared}"


def test_hosts_may_have_their_data_and_models_elsewhere() -> None:
    settings = {
        "output_dir": "/nfs/run",
        "data": {
            "path": ["/a"],
            "weight": [1],
            "read": {"images": "/a", "format": "jsonl"},
        },
        "tower": {"path": "/b", "freeze": True},
        "train": {"dataloader_num_workers": 4, "seed": 1},
        "plan": {"gpu_gib": 80},
    }
    same = {"data.weight", "data.read.format", "tower.freeze", "train.seed"}
    assert same_on_all_hosts(RunConfig, settings).keys() == same


def test_both_stages_resume_with_their_downloads_elsewhere() -> None:
    for kind, read in ((RunConfig, "data"), (FinetuneConfig, "pairs")):
        saved = {read: {"read": {"cache_folder": "/a", "format": "jsonl"}}}
        moved = {read: {"read": {"cache_folder": "/b", "format": "jsonl"}}}
        refuse_changes(kind, saved, moved, (), where="run")


def test_a_resumed_run_has_the_initial_values_of_its_checkpoint() -> None:
    saved = {"dual": {"logit_scale_init": 2.0, "pool": "cls"}}
    refuse_changes(RunConfig, saved, {"dual": {"pool": "cls"}}, (), where="run")
    with pytest.raises(
        ValueError, match=r"old_field: 1\.0 in the checkpoint, 'absent' in this"
    ):
        refuse_changes(RunConfig, {**saved, "old_field": 1}, saved, (), where="run")


def test_records_and_options_with_an_earlier_name_are_read() -> None:
    dual = {"normalise_input": False, "pool": "cls"}
    read = from_plain(RunConfig, {"dual": dual}, where="run.json").dual
    assert (read.normalize_input, read.pool) == (False, "cls")
    now = {"dual": {"normalize_input": False, "pool": "cls"}}
    refuse_changes(RunConfig, {"dual": dual}, now, (), where="run")
    with pytest.raises(
        ValueError, match=r"dual\.normalize_input: False in the checkpoint, True in"
    ):
        refuse_changes(
            RunConfig,
            {"dual": dual},
            {"dual": {**now["dual"], "normalize_input": True}},
            (),
            where="run",
        )
    changed = {"dual": {**now["dual"], "normalize_input": True}}
    refuse_changes(
        RunConfig, {"dual": dual}, changed, ("dual.normalise_input",), where="run"
    )
    for option in ("normalise-input", "normalise_input", "normalize-input"):
        assert not TRAIN_TOWER.parse([f"--dual.{option}", "False"]).dual.normalize_input


@pytest.mark.parametrize(
    ("command", "line", "option", "other"),
    [
        (
            TRAIN_TOWER,
            "--max_steps 7 --num_train_epochs 2",
            "--num-train-epochs",
            "--max-steps",
        ),
        (
            TRAIN_TOWER,
            "--recipe openai_b16 --heads.lr 1e-2",
            "--heads.lr",
            "--heads.steps",
        ),
        (TRAIN_TOWER, "--tower.freeze --learning_rate 1e-3", "--lr", "--freeze"),
        (TRAIN_TOWER, "--bf16 True --fp16 True", "--bf16", "--fp16"),
        (FINETUNE_LLM, "data --llm x --adapter a --r 8", "--lora-rank", "--adapter"),
    ],
)
def test_an_option_without_effect_is_an_error(
    command: Command, line: str, option: str, other: str
) -> None:
    with pytest.raises(ValueError, match=rf"{option} .*{other}"):
        command.parse(line.split())


def test_the_command_line_overrides_a_recipe():
    """Also by the names of the Trainer and of LLaVA's scripts."""
    words = (
        "--local_rank=1 --recipe quickstart --deepspeed scripts/zero1.json --optim.lr 2e-4 "
        "--output_dir=runs/x"
    )
    words += (
        " --data_path a b --learning_rate 3e-4 --gradient_checkpointing True --bf16 True "
        "--vision_tower t"
    )
    words += " --per_device_train_batch_size 4 --report_to tensorboard --dual.projection-norm False"
    config = TRAIN_TOWER.parse(words.split())
    assert config.optim.lr == 3e-4
    assert config.deepspeed == "scripts/zero1.json"
    assert config.output_dir == "runs/x"
    assert config.data.path == ("a", "b")
    assert config.tower.path == "t"
    assert config.train.micro_batch == 4
    assert config.train.gradient_checkpointing
    assert config.train.precision == "bf16"
    assert config.train.report_to == ("tensorboard",)
    assert not config.dual.projection_norm
    assert config.heads == recipes.quickstart().heads
    for words, expected in (
        ("", "auto"),
        ("=auto", "auto"),
        (" false", False),
        ("", True),
    ):
        given = (
            f"--gradient-checkpointing{words}".split()
            if (words, expected) != ("", "auto")
            else []
        )
        assert (
            TRAIN_TOWER.parse(
                ["--recipe", "openai_b16", *given]
            ).train.gradient_checkpointing
            == expected
        )
    assert (
        TRAIN_TOWER.parse(["--no-gradient-checkpointing"]).train.gradient_checkpointing
        is False
    )
    assert (
        TRAIN_TOWER.parse(["--bf16", "False", "--fp16=True"]).train.precision == "fp16"
    )
    # the recipe's
    assert (
        TRAIN_TOWER.parse(["--recipe", "openai_b16", "--bf16", "False"]).train.precision
        == "bf16"
    )
    assert TRAIN_TOWER.parse(["--report_to", "none"]).train.report_to == ()
