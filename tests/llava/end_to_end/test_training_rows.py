"""LLaVA's training in each of its forms, one row each, with LLaVA's own libraries and with today's.

The rows of one environment run in one process. What is left out there, and why, stands in
docs/llava.md.
"""

import json
from pathlib import Path

import llava_world
import pytest
import torch
import transformers
from llava_world import TODAY, free_port
from safetensors.torch import load_file

pytestmark = pytest.mark.both_stacks
TRAIN_ROWS = Path(__file__).with_name("train_rows.py")
SCRIPTS = Path(__file__).parents[3] / "scripts" / "llava"
SAVE = (
    "--save_strategy steps --save_steps 2 "
    "--save_total_limit 1 --lr_scheduler_type constant"
).split()


def rows(world) -> dict[str, dict]:
    """Every row by name: LLaVA's options, variables of the environment, arguments of ``train``."""
    row_of: dict[str, dict] = {}

    def row(name, stage, *options, call=None, **environment):
        words = world.stage_options(
            stage, f"llm2clip:{world.towers['clip']}", world.root / f"llava-row-{name}"
        )
        words += (
            ["--pretrain_mm_mlp_adapter", world.projector()]
            if stage != "pretrain"
            else []
        )
        row_of[name] = {
            "options": [*map(str, [*words, *options])],
            "environment": environment,
            "call": call or {},
        }

    for stage in ("pretrain", "finetune", "lora"):
        row(stage, stage)
    row("llavas-own-tower", "finetune", "--vision_tower", world.towers["clip"])
    row("checkpointing", "finetune", "--gradient_checkpointing", "True")
    row("workers", "finetune", "--dataloader_num_workers", "2")
    row("anyres", "finetune", "--image_aspect_ratio", "anyres")
    row("unfrozen", "finetune", LLM2CLIP_UNFREEZE_TOWER="1")
    row("s2", "pretrain", LLM2CLIP_S2_SCALES="28,56")  # a projector of twice the width
    row("mistral", "finetune", "--model_name_or_path", mistral(world))
    for stage in ("finetune", "lora"):
        # the projector learns fast: with the rate of LLaVA's scripts, one that starts anew at the
        # resume changes the losses by less than .02
        saved = (*SAVE, "--mm_projector_lr", "1e-2")
        row(f"whole-{stage}", stage, "--max_steps", "4", *saved)
        row(f"stopped-{stage}", stage, "--max_steps", "2", *saved)
        started_again = (
            "--max_steps",
            "4",
            "--output_dir",
            world.root / f"llava-row-stopped-{stage}",
        )
        row(f"resumed-{stage}", stage, *saved, *started_again)
    # transformers leaves the precision of the row before in this variable
    float32 = {"ACCELERATE_MIXED_PRECISION": "no"}
    for stage in ("pretrain", "finetune", "lora"):
        row(f"float32-{stage}", stage, "--bf16", "False", **float32)
    if TODAY:
        row("4-bit", "lora", "--bits", "4", "--gradient_checkpointing", "True")
        row("8-bit", "lora", "--bits", "8")
        row("train_mem", "finetune", call={"attn_implementation": "flash_attention_2"})
    rank = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }
    rank["MASTER_PORT"] = str(free_port())
    row("zero2", "finetune", "--deepspeed", world.zero_config(2), **rank)
    row("zero3", "finetune", "--deepspeed", world.zero_config(3), **rank)
    row(
        "zero3-offload",
        "finetune",
        "--deepspeed",
        world.zero_config(3, offload=True),
        **rank,
    )
    row("zero3-lora", "lora", "--deepspeed", world.zero_config(3), **rank)
    for stage in (2, 3):
        shipped = ("--bf16", "False", "--deepspeed", SCRIPTS / f"zero{stage}.json")
        row(f"float32-zero{stage}", "finetune", *shipped, **rank, **float32)
    return row_of


def mistral(world) -> Path:
    """A Mistral of two layers with the tokenizer of the world's Llama: grouped queries, no bias."""
    folder = world.root / "tiny-mistral"
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None}
    torch.manual_seed(0)
    config = transformers.MistralConfig(vocab_size=600, **sizes, **heads)
    transformers.MistralForCausalLM(config).save_pretrained(
        folder, safe_serialization=True
    )
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((world.llm / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def trained(world):
    """What went wrong in each row."""
    path = world.root / "rows.json"
    path.write_text(json.dumps(rows(world)))
    world.forked(TRAIN_ROWS, path)
    return json.loads(path.with_suffix(".told.json").read_text())


def losses(world, name):
    """The loss of each step of a row."""
    return llava_world.losses(world.root / f"llava-row-{name}")


def test_every_row_trains(world, trained):
    assert {name: output[-600:] for name, output in trained.items() if output} == {}
    assert len(trained) >= 18
    for name in trained:
        if not name.startswith(("stopped", "resumed", "whole")):
            values = losses(world, name)
            assert len(values) == 3, (name, values)
            assert all(5 < value < 8 for value in values), (name, values)


def test_what_each_stage_saves(world, trained):
    folder = world.root / "llava-row-pretrain"
    assert {
        name.partition("mm_projector.")[2]
        for name in torch.load(folder / "mm_projector.bin")
    } == {f"{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    for name in ("finetune", "zero2", "zero3"):
        saved = load_file(world.root / f"llava-row-{name}" / "model.safetensors")
        # ZeRO-3's parts are gathered
        assert all(tensor.numel() for tensor in saved.values()), name
        assert any(".mm_projector." in key for key in saved)
        assert any(".vision_tower." in key for key in saved)
    for name in ("lora", "zero3-lora"):
        folder = world.root / f"llava-row-{name}"
        assert (folder / "adapter_config.json").is_file()
        state = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
        assert all(tensor.numel() for tensor in state.values())
        assert any("mm_projector" in key for key in state)


def test_training_without_bf16_is_in_float32(world, trained):
    """LLaVA's program casts the tower to float16, which a CPU computes slowly."""
    for name in ("float32-finetune", "float32-zero2", "float32-zero3"):
        saved = load_file(world.root / f"llava-row-{name}" / "model.safetensors")
        assert any(".vision_tower." in key for key in saved)
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}, name
    projector = torch.load(world.root / "llava-row-float32-pretrain/mm_projector.bin")
    assert {tensor.dtype for tensor in projector.values()} == {torch.float32}
    # from the same projector; bf16 rounds to 8 bits, DeepSpeed before 0.19.3 does not clip
    expected = losses(world, "float32-finetune")
    assert losses(world, "finetune") == pytest.approx(expected, abs=0.05)
    for name in ("float32-zero2", "float32-zero3"):
        assert losses(world, name)[0] == pytest.approx(expected[0], abs=2e-4)
        assert losses(world, name) == pytest.approx(expected, abs=0.05)
    assert losses(world, "float32-lora") == pytest.approx(
        losses(world, "lora"), abs=0.05
    )


def test_forms_of_the_same_training_agree(world, trained):
    """Losses of three steps, in bf16 (8 bits of mantissa, values near 6.6) and from one
    projector."""
    expected = losses(world, "finetune")
    same = "checkpointing workers llavas-own-tower zero2 zero3 zero3-offload".split()
    for name in [*same, "train_mem"] if TODAY else same:
        assert losses(world, name) == pytest.approx(expected, abs=0.05), name
    assert losses(world, "zero3-lora") == pytest.approx(losses(world, "lora"), abs=0.05)
    assert losses(world, "unfrozen")[0] == expected[0]
    assert losses(world, "unfrozen")[2] != expected[2]


@pytest.mark.parametrize("stage", ["finetune", "lora"])
def test_a_stopped_training_resumes_with_the_same_losses(world, trained, stage):
    whole = losses(world, f"whole-{stage}")
    resumed = losses(world, f"stopped-{stage}")
    assert len(whole) == 4
    assert resumed == pytest.approx(whole, abs=1e-4)
