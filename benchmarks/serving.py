"""Answers a second of vLLM's server and of ``llava_integration``'s batches, on the same questions about the same model.

    .venv-llava/bin/python -m benchmarks.serving --server-python .venv-servers/bin/python [--shape l14-336]

The model is random, as in benchmarks/llava.py, exported to Hugging Face and compared with LLaVA's own code. Each way
answers every question in float32, greedily; the server keeps nothing between rounds. Seconds of the clock: what the
server computes is not in this process.
"""

# LLaVA lives in an environment of its own; the one that is checked does not have it:
# pyright: reportMissingImports=false

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from PIL import Image

from benchmarks.common import WORDS, alternate, parser, print_table, write_lines
from benchmarks.llava import SHAPES, make_llava, make_tower
from llava_integration.answer import command as evaluate
from llava_integration.answer.command import Answerer
from llava_integration.answer.questions import AnswerConfig
from llava_integration.serve import export as parity
from llava_integration.serve.export import Export, export
from llm2clip_plugin.train.distributed import free_port

PATIENCE = 900  # seconds until the server is there


def make_checkpoint(folder: Path, shape: str) -> Path:
    """A random LLaVA as LLaVA saves it, with a tokenizer of 1000 pieces."""
    model = make_llava(make_tower(shape, folder.parent / "tower"), torch.device("cpu"), torch.float32)
    model.lm_head.weight.data *= 50  # tells tokens apart: no ties between two orders of sums
    model.config.mm_use_im_patch_token = model.config.mm_use_im_start_end = False
    model.save_pretrained(folder)
    documents = (Path(__file__).parents[1] / "docs").glob("*.md")
    sentencepiece.SentencePieceTrainer.train(
        input=",".join(map(str, sorted(documents))),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=model.config.vocab_size,
        model_type="bpe",
        character_coverage=0.99,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "pad_token": "<unk>", "add_bos_token": True}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def make_questions(folder: Path, count: int) -> Path:
    """Questions about images of noise of a photograph's size."""
    noise = np.random.default_rng(0)
    for number in range(count):
        pixels = noise.integers(0, 255, (12, 16, 3)).astype("uint8")
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
    rows = ({"question_id": n, "image": f"{n}.jpg", "text": f"Is there {WORDS[n % 9]}?"} for n in range(count))
    return write_lines(folder / "questions.jsonl", rows)


@contextmanager
def vllm_serving(python: Path, model: Path, most: int) -> Iterator[str]:
    """URL of a server of ``model`` that answers ``most`` requests at a time."""
    port = free_port()
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1"]
    words += ["--port", port, "--dtype", "float32", "--max-model-len", 1024, "--max-num-seqs", most]
    words += ["--limit-mm-per-prompt", '{"image":1}', "--no-enable-prefix-caching", "--mm-processor-cache-gb", 0]
    words += [] if torch.cuda.is_available() else ["--enforce-eager"]
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    command, environment, log = list(map(str, words)), {**os.environ, **cpu}, model.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            url, until = f"http://127.0.0.1:{port}/v1", time.monotonic() + PATIENCE
            while True:
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"no server:\n{log.read_text(errors='replace')[-4000:]}")
                try:
                    urllib.request.urlopen(f"{url}/models", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def answer(answerer: Answerer, parsed: AnswerConfig, questions: list[Any], size: int) -> list[str]:
    """The answers to all questions in batches of ``size``."""
    answerer.options = replace(parsed, batch_size=size)
    batches = answerer.batches(questions, list(range(len(questions))))
    return [text for batch in batches for text in answerer.generate(batch)]


def ways(args: argparse.Namespace, checkpoint: Path, questions: Path, url: str) -> dict[str, Callable[[], list[str]]]:
    """Each way to answer all questions, by name; without ``url``, batches alone."""
    common = ["--question-file", questions, "--image-folder", questions.parent, "--max-new-tokens", args.tokens]
    words = [*common, "--model-path", checkpoint, "--answers-file", "unused", "--workers", 0, "--dtype", "float32"]
    local = evaluate.COMMAND.parse(list(map(str, words)))
    answerer, read = Answerer(local), evaluate.read_questions(questions)

    def served(at_a_time: int) -> list[str]:
        path = questions.with_name("served.jsonl")
        words: list[Any] = [*common, "--endpoint", url, "--answers-file", path, "--concurrency", at_a_time]
        assert evaluate.main([*map(str, words), "--overwrite"]) == 0
        return [json.loads(line)["text"] for line in path.read_text().splitlines()]

    batches = {f"batches of {size}": partial(answer, answerer, local, read, size) for size in args.at_a_time}
    servers = {f"vLLM, {size} requests at a time": partial(served, size) for size in args.at_a_time}
    return {**batches, **(servers if url else {})}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--server-python", type=Path, help="Python of the environment with vLLM; default: no server")
    options.add_argument("--shape", choices=SHAPES, default="b16", help="shape of the random tower")
    options.add_argument("--questions", type=int, default=32)
    options.add_argument("--tokens", type=int, default=16, help="--max-new-tokens")
    options.add_argument("--at-a-time", type=int, nargs="+", default=[1, 16], help="batch sizes, requests at a time")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = make_checkpoint(Path(scratch) / "llava-random", args.shape)
        (Path(scratch) / "questions").mkdir()
        questions = make_questions(Path(scratch) / "questions", args.questions)
        serving = nullcontext("")
        if args.server_python:
            made = Export.of(checkpoint, dtype="fp32")
            export(made, Path(scratch) / "hf")
            print(f"compared with LLaVA's own code: {parity.compare(made, Path(scratch) / 'hf')}", flush=True)
            serving = vllm_serving(args.server_python, Path(scratch) / "hf", max(args.at_a_time))
        with serving as url:
            runs = alternate(ways(args, checkpoint, questions, url), args.rounds)
    first = next(iter(runs.values()))[-1].result
    equal = {way: f"{sum(map(eq, first, one[-1].result))} of {len(first)}" for way, one in runs.items()}
    columns = {"answers equal to the first way's": equal}
    print_table(f"{args.shape}", runs, amount=args.questions, unit="answers", clock="wall", columns=columns)


if __name__ == "__main__":
    main()
