"""LLaVA's own programs with our tower: ``cli``, ``run_llava``, ``model_vqa*``."""

import base64
import io
import json
import runpy
import sys
from importlib.util import find_spec

import parity_world
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.both_stacks


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return parity_world.make_parity_world(tmp_path_factory.mktemp("programs") / "world")


def expected(checkpoint, image, prompt):
    """What LLaVA answers in this process, loaded as its programs load."""
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    tokenizer, model, processor, _ = load_pretrained_model(
        str(checkpoint), None, checkpoint.name, device="cpu"
    )
    assert type(model.get_vision_tower()).__module__.startswith(
        "llava_integration.plug.tower"
    )
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    pixels = process_images([image], processor, model.config).to(torch.float16)
    with torch.inference_mode():
        output = model.generate(
            ids,
            images=pixels,
            image_sizes=[image.size],
            do_sample=False,
            max_new_tokens=8,
        )
    return tokenizer.decode(output[0], skip_special_tokens=True).strip()


def program(monkeypatch, capsys, name, *words, typed=""):
    """What a program of LLaVA prints, run in this process."""
    # disable_torch_init replaces it; put back afterwards
    for layer in (torch.nn.Linear, torch.nn.LayerNorm):
        monkeypatch.setattr(layer, "reset_parameters", layer.reset_parameters)
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    capsys.readouterr()
    runpy.run_module(name, run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("name", parity_world.CHECKPOINTS)
def test_programs_without_a_server(world, name, home, tmp_path, monkeypatch, capsys):
    """Of a Llama, a Mistral with anyres, and S2. They call ``.cuda()`` whatever the device, which
    does nothing here."""
    from llava.conversation import conv_templates

    checkpoint = world.root / name
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    talk = conv_templates["vicuna_v1"].copy()
    talk.append_message(talk.roles[0], "<image>\nWhat is it?")
    talk.append_message(talk.roles[1], None)
    path = min(world.images.iterdir())
    answer = expected(checkpoint, Image.open(path).convert("RGB"), talk.get_prompt())
    assert answer
    same = (
        "--model-path",
        checkpoint,
        "--conv-mode",
        "vicuna_v1",
        "--temperature",
        "0",
    )
    asked = (*same, "--image-file", path)
    cli = program(
        monkeypatch,
        capsys,
        "llava.serve.cli",
        *asked,
        "--device",
        "cpu",
        "--max-new-tokens",
        "8",
        typed="What is it?",
    )
    assert cli.split("ASSISTANT: ")[1].startswith(answer)
    words = ("--query", "What is it?", "--max_new_tokens", "8")
    assert (
        program(monkeypatch, capsys, "llava.eval.run_llava", *asked, *words)
        .strip()
        .endswith(answer)
    )
    for script, written in question_files(path).items():
        questions = tmp_path / f"{script}.questions"
        answers = tmp_path / "answers" / f"{script}.jsonl"
        questions.write_text(written)
        words = ["--question-file", questions, "--answers-file", answers]
        words += (
            [] if script == "model_vqa_mmbench" else ["--image-folder", world.images]
        )
        program(monkeypatch, capsys, f"llava.eval.{script}", *same, *words)
        assert json.loads(answers.read_text())["text"].startswith(answer), script


def question_files(image):
    """Program -> the same question in the form of its question file; MMBench's needs pandas, as
    LLaVA does."""
    said = [{"from": "human", "value": "<image>\nWhat is it?"}]
    files = {
        "model_vqa": json.dumps(
            {"question_id": 1, "image": image.name, "text": "What is it?"}
        ),
        "model_vqa_science": json.dumps(
            [{"id": "1", "image": image.name, "conversations": said}]
        ),
    }
    if find_spec("pandas"):
        encoded = base64.b64encode(image.read_bytes()).decode()
        files["model_vqa_mmbench"] = (
            f"index\tquestion\thint\tA\tB\tC\tD\timage\n1\tWhat is it?\t\t\t\t\t\t{encoded}\n"
        )
    return files
