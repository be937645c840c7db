"""LLaVA's own programs with our tower: controller and worker over HTTP, ``cli``, ``run_llava``, ``model_vqa*``."""

import base64
import io
import json
import runpy
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec

import parity_world
import pytest
import requests
import torch
from llava_world import free_port
from PIL import Image

pytestmark = pytest.mark.both_stacks
NEEDS_SERVERS = pytest.mark.skipif(
    find_spec("fastapi") is None or find_spec("uvicorn") is None, reason="needs fastapi and uvicorn, as LLaVA does"
)
PROMPT = "A chat. USER: <image>\nWhich colour is the picture? ASSISTANT:"
PATIENCE = 120  # seconds for two servers to start on a busy machine


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return parity_world.make_parity_world(tmp_path_factory.mktemp("programs") / "world")


@pytest.fixture(scope="module")
def checkpoint(world):
    return world.root / "llava-llama"


@contextmanager
def running(world, log, *words):
    """A module of LLaVA as a process of its own, which is told to end at the end of the block."""
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [world.programs / "python", "-m", *map(str, words)],
            env=world.environment(),
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def asked(url, ready, processes):
    """The first answer to POST ``url`` that is ``ready``; fails with a process that has ended."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        assert all(process.poll() is None for process in processes), "a server has ended"
        try:
            told = requests.post(url, timeout=5).json()
        except requests.ConnectionError:
            told = None
        if told is not None and ready(told):
            return told
        time.sleep(0.3)
    raise AssertionError(f"no answer from {url} in {PATIENCE} s")


@pytest.fixture(scope="module")
def worker(world, checkpoint, tmp_path_factory):
    """Address of a worker that the controller knows."""
    logs = tmp_path_factory.mktemp("serving")
    controller, address = (f"http://localhost:{free_port()}" for _ in range(2))
    port = controller.rpartition(":")[2]
    started = running(world, logs / "controller.log", "llava.serve.controller", "--host", "localhost", "--port", port)
    words = ["llava.serve.model_worker", "--host", "localhost", "--port", address.rpartition(":")[2], "--device", "cpu"]
    words += ["--controller-address", controller, "--worker-address", address, "--model-path", checkpoint]
    with started as first:
        asked(f"{controller}/list_models", lambda told: "models" in told, [first])  # a worker asks but once
        with running(world, logs / "worker.log", *words) as second:
            asked(f"{controller}/list_models", lambda told: told["models"] == [checkpoint.name], [first, second])
            asked(f"{address}/worker_get_status", lambda told: True, [first, second])
            yield address


def expected(checkpoint, image, prompt=PROMPT):
    """What LLaVA answers in this process, loaded as its programs load."""
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    tokenizer, model, processor, _ = load_pretrained_model(str(checkpoint), None, checkpoint.name, device="cpu")
    assert type(model.get_vision_tower()).__module__.startswith("llava_integration.tower")
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    pixels = process_images([image], processor, model.config).to(torch.float16)
    with torch.inference_mode():
        output = model.generate(ids, images=pixels, image_sizes=[image.size], do_sample=False, max_new_tokens=8)
    return tokenizer.decode(output[0], skip_special_tokens=True).strip()


@NEEDS_SERVERS
def test_a_worker_answers_with_our_tower(worker, checkpoint, world):
    answers = set()
    for path in sorted(world.images.iterdir())[::3]:
        body = {
            "model": checkpoint.name,
            "prompt": PROMPT,
            "images": [base64.b64encode(path.read_bytes()).decode()],
            "temperature": 0,
            "max_new_tokens": 8,
            "stop": "</s>",
        }
        told = requests.post(f"{worker}/worker_generate_stream", json=body, timeout=60).content
        pieces = [json.loads(piece) for piece in told.split(b"\0") if piece]
        assert pieces and {piece["error_code"] for piece in pieces} == {0}, pieces
        answer = pieces[-1]["text"].removeprefix(PROMPT).strip()
        assert answer == expected(checkpoint, Image.open(path).convert("RGB"))
        answers.add(answer)
    assert len(answers) > 1, "the answer does not depend on the picture"


def program(monkeypatch, capsys, name, *words, typed=""):
    """What a program of LLaVA prints, run in this process."""
    for layer in (
        torch.nn.Linear,
        torch.nn.LayerNorm,
    ):  # disable_torch_init replaces it; put back afterwards
        monkeypatch.setattr(layer, "reset_parameters", layer.reset_parameters)
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    capsys.readouterr()
    runpy.run_module(name, run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("name", parity_world.CHECKPOINTS)
def test_programs_without_a_server(world, name, home, tmp_path, monkeypatch, capsys):
    """Of a Llama, a Mistral with anyres, and S2. They call ``.cuda()`` whatever the device, which does nothing here."""
    from llava.conversation import conv_templates

    checkpoint = world.root / name
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    talk = conv_templates["vicuna_v1"].copy()
    talk.append_message(talk.roles[0], "<image>\nWhat is it?")
    talk.append_message(talk.roles[1], None)
    path = min(world.images.iterdir())
    answer = expected(checkpoint, Image.open(path).convert("RGB"), talk.get_prompt())
    assert answer
    same = ("--model-path", checkpoint, "--conv-mode", "vicuna_v1", "--temperature", "0")
    asked = (*same, "--image-file", path)
    cli = program(
        monkeypatch, capsys, "llava.serve.cli", *asked, "--device", "cpu", "--max-new-tokens", "8", typed="What is it?"
    )
    assert cli.split("ASSISTANT: ")[1].startswith(answer)
    words = ("--query", "What is it?", "--max_new_tokens", "8")
    assert program(monkeypatch, capsys, "llava.eval.run_llava", *asked, *words).strip().endswith(answer)
    for script, written in question_files(path).items():
        questions, answers = tmp_path / f"{script}.questions", tmp_path / "answers" / f"{script}.jsonl"
        questions.write_text(written)
        words = ["--question-file", questions, "--answers-file", answers]
        words += [] if script == "model_vqa_mmbench" else ["--image-folder", world.images]
        program(monkeypatch, capsys, f"llava.eval.{script}", *same, *words)
        assert json.loads(answers.read_text())["text"].startswith(answer), script


def question_files(image):
    """Program -> the same question in the form of its question file; MMBench's needs pandas, as LLaVA does."""
    said = [{"from": "human", "value": "<image>\nWhat is it?"}]
    files = {
        "model_vqa": json.dumps({"question_id": 1, "image": image.name, "text": "What is it?"}),
        "model_vqa_science": json.dumps([{"id": "1", "image": image.name, "conversations": said}]),
    }
    if find_spec("pandas"):
        encoded = base64.b64encode(image.read_bytes()).decode()
        files["model_vqa_mmbench"] = f"index\tquestion\thint\tA\tB\tC\tD\timage\n1\tWhat is it?\t\t\t\t\t\t{encoded}\n"
    return files
