"""What the scripts refuse before a rank starts: one line a problem, with the value and what to
do."""

import json
import re
import shutil

import pytest
import torch
from tiny_hub import cached_repository

from llava_integration.plug.preflight import main
from llava_integration.plug.resumed_data import (
    data_record,
    model_record,
    record_data,
)
from llava_integration.plug.towers import KEY
from llm2clip_plugin.contracts import TowerCard

HUMAN = {"from": "human", "value": "<image>\nWhat is it?"}
GPT = {"from": "gpt", "value": "a red picture"}


def refused(capsys, world, stage="finetune", llava="", **changed):
    """The lines of stderr for the world's options, of which some are changed; [] if nothing is
    wrong. ``llava``: after --, LLaVA's own options."""
    data = world.pretrain_data if stage == "pretrain" else world.finetune_data
    options = {
        "model": world.llm,
        "data": data,
        "image-folder": world.images,
        "output": "checkpoints/llava-lora-1",
    }
    options |= {
        "tower": f"llm2clip:{world.towers['clip']}",
        "projector": world.projector(),
        **changed,
    }
    words = [
        word for name, value in options.items() for word in (f"--{name}", str(value))
    ]
    status = main([stage, *words, "--", *llava.split()])
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert status == (2 if lines else 0)
    assert len(printed.out.splitlines()) == (0 if lines else 6)
    return lines


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "finetune_lora"])
def test_good_options_are_accepted(capsys, world, home, stage):
    assert refused(capsys, world, stage) == []
    assert (
        refused(
            capsys,
            world,
            stage,
            tower="openai/clip-vit-large-patch14-336",
            model="lmsys/vicuna-7b-v1.5",
        )
        == []
    )


NAMES = [("finetune", "run-1", "llava-run-1"), ("finetune_lora", "llava-1", "lora")]
NAMES += [
    ("finetune", "llava-prompts", "mpt"),
    ("pretrain", "llava/checkpoint-5", "checkpoint-"),
]
NAMES += [("finetune", "llava-1/checkpoint-5", ""), ("pretrain", "projector", "")]


@pytest.mark.parametrize("stage, name, message", NAMES)
def test_names_by_which_llava_loads(capsys, world, home, stage, name, message):
    lines = refused(capsys, world, stage, output=name)
    assert len(lines) == bool(message)
    assert not message or (
        lines[0].startswith("error: --output") and re.search(message, lines[0])
    )


@pytest.mark.parametrize(
    "stage, content, message",
    [
        ("finetune", "{", "expected LLaVA's JSON"),
        ("finetune", "\ufeff[]", "starts with a byte-order mark"),
        ("finetune", "[]", "a list of samples; found []"),
        (
            "finetune",
            [{"id": 7, "conversations": [GPT, HUMAN, HUMAN]}],
            "the turns are from human, human",
        ),
        (
            "pretrain",
            [{"conversations": [HUMAN, GPT]}],
            "pretraining needs an image and two turns",
        ),
        (
            "finetune",
            [{"image": "x.png", "conversations": [HUMAN, GPT]}],
            "1 of 1 images checked are missing",
        ),
        (
            "finetune",
            [{"image": "x.png", "conversations": [HUMAN, GPT, HUMAN, GPT]}],
            "sample 0: <image> is in 2 turns",
        ),
    ],
)
def test_data_that_llava_would_stop_at(
    capsys, world, home, tmp_path, stage, content, message
):
    path = tmp_path / "data.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    (line,) = refused(capsys, world, stage, data=path)
    assert message in line
    assert str(path) in line


def test_every_problem_has_its_line(capsys, world, home, tmp_path):
    wrong = {
        name: tmp_path / name for name in ("model", "data", "image-folder", "projector")
    }
    lines = refused(capsys, world, tower="openia/clip", **wrong)
    assert [line.split()[1] for line in lines] == [
        "--model",
        "--image-folder",
        "DATA",
        "--projector",
        "--tower",
    ]


def test_outputs_that_llava_cannot_write_or_resume(capsys, world, home, tmp_path):
    (line,) = refused(capsys, world, output=__file__)
    assert line.startswith(f"error: --output {__file__} ")
    (tmp_path / "checkpoint-20").mkdir()
    assert refused(capsys, world, output=tmp_path / "llava-1") == []
    (line,) = refused(capsys, world, "pretrain", output=tmp_path)
    assert "contains checkpoint-20" in line
    assert f"{tmp_path}/checkpoint-20/mm_projector.bin" in line


def test_a_checkpoint_of_other_data(capsys, world, home, tmp_path):
    output = tmp_path / "llava-1"
    (output / "checkpoint-20").mkdir(parents=True)
    data = tmp_path / "moved.json"
    data.write_bytes(world.finetune_data.read_bytes())
    record_data(output / "checkpoint-20", data_record(world.finetune_data))
    assert refused(capsys, world, output=output, data=data) == []
    data.write_text(json.dumps(json.loads(data.read_text())[::-1]))
    (line,) = refused(capsys, world, output=output, data=data)
    assert f"checkpoint-20 was trained on {world.finetune_data} (sha256" in line
    assert f"DATA {data} has sha256" in line
    assert "choose another --output, or" in line


def test_a_checkpoint_of_another_model(capsys, world, home, tmp_path, monkeypatch):
    output = tmp_path / "llava-1"
    checkpoint = output / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    record_data(checkpoint, data_record(world.finetune_data))
    model = tmp_path / "vicuna"
    shutil.copytree(world.llm, model)
    assert refused(capsys, world, output=output, model=model) == []
    record_data(checkpoint, model_record(str(world.llm)))
    assert refused(capsys, world, output=output, model=model) == []
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"abcd")
    (line,) = refused(capsys, world, output=output, model=model)
    assert f"checkpoint-20 was trained from {world.llm} (sampled sha256" in line
    assert f"--model {model} has" in line
    assert "choose another --output, or" in line
    hub = "someone/vicuna"
    assert refused(capsys, world, output=output, model=hub) == []
    cached_repository(tmp_path, monkeypatch, hub, model, "0" * 40, ("main",))
    (line,) = refused(capsys, world, output=output, model=hub)
    assert f"--model {hub} has" in line


def test_towers(capsys, world, home, tmp_path, monkeypatch):
    (line,) = refused(capsys, world, tower=f"llm2clip:{world.towers['wide']}")
    assert "expects features of width 32" in line
    assert "hidden_size 48" in line
    scales = tmp_path / "scales.bin"
    torch.save({"model.mm_projector.0.weight": torch.zeros(32, 64)}, scales)
    monkeypatch.setenv("LLM2CLIP_S2_SCALES", "28,56")
    assert refused(capsys, world, projector=scales) == []


def test_a_projector_of_another_tower(capsys, world, home, tmp_path):
    """Of the same width, by the config.json that pretraining leaves next to it."""
    projector = tmp_path / "mm_projector.bin"
    shutil.copy(world.projector(), projector)
    card = TowerCard.read(world.towers["clip"] / TowerCard.FILE)
    record = {"weights_sha256": card.weights_sha256}

    def lines(tower, **config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return refused(capsys, world, tower=tower, projector=projector)

    clip = f"llm2clip:{world.towers['clip']}"
    siglip = f"llm2clip:{world.towers['siglip']}"
    llavas = "openai/clip-vit-large-patch14-336"
    ours = {"mm_vision_tower": "llm2clip", KEY: record}
    theirs = {"mm_vision_tower": llavas}
    assert lines(clip, **ours) == lines(llavas, **theirs) == lines(clip) == []
    for tower, config in ((siglip, ours), (llavas, ours), (clip, theirs)):
        (line,) = lines(tower, **config)
        assert f"{projector} was pretrained with the vision tower" in line
        assert tower in line
        assert str(config["mm_vision_tower"]) in line


def test_options_of_llava_take_precedence(capsys, world, home, tmp_path):
    """As the last of the same name does in LLaVA; other names are LLaVA's to read."""
    wide = f"llm2clip:{world.towers['wide']}"
    (line,) = refused(capsys, world, llava=f"--vision_tower {wide}")
    assert "but the tower 'llm2clip:" in line
    assert "hidden_size 48" in line
    assert (
        refused(
            capsys,
            world,
            llava=f"--vision_tower llm2clip:{world.towers['siglip']} --max_steps 3",
        )
        == []
    )
    (line,) = refused(
        capsys,
        world,
        "pretrain",
        llava=f"--pretrain_mm_mlp_adapter {tmp_path}/no.bin",
        projector="x",
    )
    assert line.startswith(f"error: --projector {tmp_path}/no.bin does not exist")
