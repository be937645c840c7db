"""LLaVA checkpoints that v0.1 wrote (tests/fixtures/v0_1/llava): loaded, answering and trained on as v0.1 did."""

import dataclasses
import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.builder import build_vision_tower
from safetensors.torch import load_file

FIXTURES = Path(__file__).parents[2] / "fixtures"
sys.path.insert(0, str(FIXTURES))

from make_v0_1 import features, pixels, replace_in_texts  # noqa: E402

from llava_integration import evaluate  # noqa: E402
from llm2clip_plugin.cli import main as llm2clip  # noqa: E402
from llm2clip_plugin.contracts import ContractError  # noqa: E402

EXPECTED = json.loads((FIXTURES / "v0_1" / "llava" / "expected.json").read_text())
TENSORS = load_file(FIXTURES / "v0_1" / "expected.safetensors")


@pytest.fixture
def v0_1(tmp_path, monkeypatch):
    """A copy of the fixtures, with its own list of towers."""
    folder = tmp_path / "v0_1"
    shutil.copytree(FIXTURES / "v0_1", folder, ignore=shutil.ignore_patterns("training", "data"))
    replace_in_texts(folder, "@ROOT@", str(folder))
    llava = folder / "llava"
    shutil.copy(llava / "tiny-vicuna/tokenizer.model", llava / "llava-finetuned")
    for path in (llava / "llava-finetuned").iterdir():  # what both have is stored once
        if not (llava / "llava-bundled" / path.name).exists():
            shutil.copy(path, llava / "llava-bundled")
    monkeypatch.setenv("LLM2CLIP_HOME", str(folder / "home"))
    monkeypatch.delenv("LLM2CLIP_TOWER", raising=False)
    return folder


def tower_of(checkpoint):
    """The vision tower as load_pretrained_model loads it."""
    _, model, _, _ = load_pretrained_model(str(checkpoint), None, "llava-v0.1", device_map="cpu", device="cpu")
    return model.get_vision_tower()


def answers(v0_1, checkpoint, *more):
    """The texts that a checkpoint gives to the fixture's questions."""
    output = v0_1 / f"now-{len(list(v0_1.glob('now-*')))}.jsonl"
    words = ["--question-file", v0_1 / "llava/questions.jsonl", "--image-folder", v0_1 / "llava/images"]
    words += ["--answers-file", output, "--max_new_tokens", "12", "--workers", "0", "--dtype", "float32"]
    assert evaluate.main([str(word) for word in (*words, "--model-path", checkpoint, *more)]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def texts(rows):
    return [(row["question_id"], row["prompt"], row["text"]) for row in rows]


def recorded(v0_1):
    return [json.loads(line) for line in (v0_1 / "llava/answers.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "eva02", "imported"])
def test_towers(v0_1, name):
    """The features that the training environment's libraries gave v0.1."""
    for key, value in features(v0_1 / "towers" / name).items():
        torch.testing.assert_close(value, TENSORS[f"{name}.{key}"], atol=2e-5, rtol=2e-4, msg=f"{name}: {key}")


def test_a_checkpoint_answers_as_it_did(v0_1):
    """Its tower by the recorded path and hash."""
    now, before = answers(v0_1, v0_1 / "llava/llava-finetuned"), recorded(v0_1)
    assert texts(now) == texts(before) and len({row["text"] for row in before}) > 2
    assert now[0].keys() == before[0].keys()


def test_killed_answers_of_v0_1_are_resumed(v0_1, monkeypatch):
    """What was answered stays as it is, answer_id included; the rest is what a run without the kill answered."""
    monkeypatch.chdir(v0_1 / "llava")  # the settings have the path of the model
    partial = next(Path("stopped.jsonl.partial").glob("*.jsonl")).read_text().splitlines()
    before = {row["index"]: row["answer"] for row in map(json.loads, partial)}
    assert 0 < len(before) < 12
    settings = json.loads(Path("stopped.jsonl.settings.json").read_text())
    # The hash of the checkpoint's config.json, in which this copy's path stands by now.
    settings["model_config_sha256"] = hashlib.sha256(Path("llava-finetuned/config.json").read_bytes()).hexdigest()
    Path("stopped.jsonl.settings.json").write_text(json.dumps(settings))
    words = ["--question-file", "questions.jsonl", "--image-folder", "images", "--answers-file", "stopped.jsonl"]
    words += ["--max_new_tokens", "12", "--workers", "0", "--dtype", "float32", "--model-path", "llava-finetuned"]
    assert evaluate.main(words) == 0
    rows = [json.loads(line) for line in Path("stopped.jsonl").read_text().splitlines()]
    assert {index: rows[index] for index in before} == before
    assert texts(rows) == texts(recorded(v0_1))
    with pytest.raises(ContractError, match="max_new_tokens"):
        evaluate.main([*words, "--max_new_tokens", "13"])


def test_a_bundled_checkpoint_needs_nothing_else(v0_1):
    bundled = shutil.move(v0_1 / "llava/llava-bundled", v0_1 / "llava-elsewhere")
    shutil.rmtree(v0_1 / "towers")
    shutil.rmtree(v0_1 / "home")
    assert texts(answers(v0_1, bundled)) == texts(recorded(v0_1))


def test_a_moved_tower_is_found_by_its_hash(v0_1, capsys):
    """Not where the checkpoint says, but known to `llm2clip towers` under its hash."""
    shutil.move(v0_1 / "towers/clip", v0_1 / "moved")
    assert llm2clip(["use", str(v0_1 / "moved"), "--name", "elsewhere"]) == 0
    assert texts(answers(v0_1, v0_1 / "llava/llava-finetuned")) == texts(recorded(v0_1))


def test_another_tower_is_refused_with_both_hashes(v0_1):
    """Same shape, same place, other weights."""
    stored = json.loads((v0_1 / "llava/llava-finetuned/config.json").read_text())["llm2clip_tower"]["weights_sha256"]
    shutil.rmtree(v0_1 / "towers/clip")
    shutil.rmtree(v0_1 / "home")
    shutil.copytree(v0_1 / "towers/dinov2", v0_1 / "towers/clip")
    other = json.loads((v0_1 / "towers/clip/llm2clip.json").read_text())["weights_sha256"]
    with pytest.raises(ContractError) as error:
        tower_of(v0_1 / "llava/llava-finetuned")
    assert stored in str(error.value) and other in str(error.value)


def test_llm2clip_is_the_chosen_tower(v0_1):
    """The projector was pretrained with `--vision_tower llm2clip`, which towers.json makes towers/clip."""
    config = json.loads((v0_1 / "llava/llava-projector/config.json").read_text())
    assert config["mm_vision_tower"] == "llm2clip"
    arguments = (str(v0_1 / "llava/llava-projector"), str(v0_1 / "llava/tiny-vicuna"), "llava-v0.1")
    _, model, processor, _ = load_pretrained_model(*arguments, device_map="cpu", device="cpu")
    assert processor.crop_size["height"] == 16 and model.get_vision_tower().vision_tower_name == "llm2clip"
    tower = build_vision_tower(model.config)  # again, for float32: LLaVA loads in float16
    expected = TENSORS["clip.hidden"][:, 1:]  # mm_vision_select_layer -2, patches
    torch.testing.assert_close(tower(pixels(16)), expected, atol=2e-5, rtol=2e-4)


def test_a_projector_of_v0_1_is_finetuned_with_the_same_losses(v0_1, world):
    """Three steps from v0.1's projector; bfloat16, so a CPU of another kind may differ in the third digit."""
    moved = dataclasses.replace(
        world,
        llm=v0_1 / "llava/tiny-vicuna",
        images=v0_1 / "llava/images",
        finetune_data=v0_1 / "llava/finetune.json",
    )
    adapter = ("--pretrain_mm_mlp_adapter", str(v0_1 / "llava/llava-projector/mm_projector.bin"))
    tower, output = f"llm2clip:{v0_1}/towers/clip", v0_1 / "again"
    tests = Path(__file__).parents[2]
    places = {"LLM2CLIP_HOME": str(v0_1 / "home"), "PYTHONPATH": f"{tests}/llava/on_cpu:{tests.parent}"}
    losses = moved.stage("finetune", tower, output, *adapter, **places)
    assert losses == pytest.approx(EXPECTED["finetune_losses"], rel=5e-3)
    stored, before = (
        json.loads((folder / "config.json").read_text()) for folder in (output, v0_1 / "llava/llava-finetuned")
    )
    for config in (stored, before):
        config["llm2clip_tower"].pop("plugin_version", None)
    assert stored["llm2clip_tower"] == before["llm2clip_tower"]
