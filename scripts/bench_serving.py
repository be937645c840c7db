"""Answers a second of vLLM's server and of ``llava_integration``'s batches, on the same questions about the same model.

    python scripts/bench_serving.py --server-python .venv-servers/bin/python    # in LLaVA's environment
    python scripts/bench_serving.py --server-python .venv-servers/bin/python --shape l14-336 --questions 512  # on a GPU

The model is random: a CLIP tower of ``--shape`` and a small Llama, as in bench_llava.py, exported to Hugging Face and
compared with LLaVA's own code. Each way answers every question in float32, greedily. The ways alternate, each round
starting with the next one; the server keeps nothing between rounds. Seconds are wall time, and processor time of this
process and the server's, which other programs hardly disturb (Linux).
"""

# LLaVA lives in an environment of its own; the one that is checked does not have it:
# pyright: reportMissingImports=false

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from bench import argument_parser
from bench_llava import SHAPES, make_llava, make_tower
from PIL import Image

from llava_integration.answer import command as evaluate
from llava_integration.answer.model import Answerer
from llava_integration.serve import parity
from llava_integration.serve.export import Export, export

ROOT = Path(__file__).parents[1]
PATIENCE = 900  # seconds until the server is there
TICKS = os.sysconf("SC_CLK_TCK")


def make_checkpoint(folder: Path, shape: str) -> Path:
    """A random LLaVA as LLaVA saves it, with a tokenizer of 1000 pieces."""
    tower = make_tower(shape, folder.parent / "tower")
    model = make_llava(tower, torch.device("cpu"), torch.float32)
    model.lm_head.weight.data *= 50  # tells tokens apart: no ties between two orders of sums
    model.config.mm_use_im_patch_token = model.config.mm_use_im_start_end = False
    model.save_pretrained(folder)
    sentencepiece.SentencePieceTrainer.train(
        input=",".join(map(str, sorted((ROOT / "docs").glob("*.md")))),
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
    """Questions about photographs' sizes of noise, an image each."""
    noise = np.random.default_rng(0)
    lines = []
    for number in range(count):
        pixels = noise.integers(0, 255, (12, 16, 3)).astype("uint8")
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
        lines.append(json.dumps({"question_id": number, "image": f"{number}.jpg", "text": "What is in the picture?"}))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "questions.jsonl"


@contextmanager
def vllm_serving(python: Path, model: Path, most: int) -> Iterator[tuple[str, int]]:
    """URL and process group of a server of ``model`` that answers ``most`` requests at a time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--port",
        port,
        "--host",
        "127.0.0.1",
    ]
    words += ["--dtype", "float32", "--max-model-len", 1024, "--max-num-seqs", most, "--limit-mm-per-prompt"]
    words += ['{"image":1}', "--no-enable-prefix-caching", "--mm-processor-cache-gb", 0]
    words += [] if torch.cuda.is_available() else ["--enforce-eager"]
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    log = model.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(map(str, words)), env={**os.environ, **cpu}, stdout=output, stderr=output, start_new_session=True
        )
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
            yield url, process.pid
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def seconds_of_group(group: int) -> float:
    """Processor seconds of every process of a group so far."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(fields[2]) == group:
            total += int(fields[11]) + int(fields[12])
    return total / TICKS


def ways(
    options: argparse.Namespace, checkpoint: Path, questions: Path, url: str
) -> dict[str, Callable[[], list[str]]]:
    """Each way to answer all questions, by name."""
    common = ["--question-file", questions, "--image-folder", questions.parent, "--max-new-tokens", options.tokens]

    def words(*more: object) -> list[str]:
        return [str(word) for word in (*common, *more)]

    local = evaluate.COMMAND.parse(
        words("--model-path", checkpoint, "--answers-file", "unused", "--workers", 0, "--dtype", "float32")
    )
    answerer, read = Answerer(local), evaluate.read_questions(questions)

    def batches(size: int) -> list[str]:
        answerer.options = replace(local, batch_size=size)
        return [
            text
            for batch in answerer.batches(read, list(range(len(read))))
            for text in answerer.generate(batch)
        ]  # fmt: skip

    def served(at_a_time: int) -> list[str]:
        path = questions.with_name("served.jsonl")
        asked = words("--endpoint", url, "--answers-file", path, "--concurrency", at_a_time, "--overwrite")
        assert evaluate.main(asked) == 0
        return [json.loads(line)["text"] for line in path.read_text().splitlines()]

    made: dict[str, Callable[[], list[str]]] = {}
    for size in options.at_a_time:
        made[f"batches of {size}"] = lambda size=size: batches(size)
        made[f"vLLM, {size} requests at a time"] = lambda size=size: served(size)
    return made


def main() -> None:
    """Print the results, as JSON with --json."""
    parser = argument_parser(__doc__)
    parser.add_argument("--server-python", type=Path, required=True, help="Python of the environment with vLLM")
    parser.add_argument("--shape", choices=SHAPES, default="b16", help="shape of the random tower")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16, help="--max-new-tokens")
    parser.add_argument("--at-a-time", type=int, nargs="+", default=[1, 16], help="batch sizes, requests at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = make_checkpoint(Path(scratch) / "llava-random", options.shape)
        made = Export.of(checkpoint, dtype="fp32")
        export(made, Path(scratch) / "hf")
        print(f"compared with LLaVA's own code: {parity.compare(made, Path(scratch) / 'hf')}", flush=True)
        (Path(scratch) / "questions").mkdir()
        questions = make_questions(Path(scratch) / "questions", options.questions)
        with vllm_serving(options.server_python, Path(scratch) / "hf", max(options.at_a_time)) as (url, group):
            results = measured(ways(options, checkpoint, questions, url), options, group)
    print(json.dumps(results, indent=2) if options.json else "\n".join(f"{v:10.3f}  {n}" for n, v in results.items()))


def measured(by_name: dict[str, Callable[[], list[str]]], options: argparse.Namespace, group: int) -> dict[str, float]:
    """Answers a second by both clocks, ratios to the first way, and how many answers are those of the first way."""
    walls: dict[str, list[float]] = {name: [] for name in by_name}
    processors: dict[str, list[float]] = {name: [] for name in by_name}
    answers: dict[str, list[str]] = {}
    names = list(by_name)
    for number in range(options.rounds + 1):  # the first warms up
        for name in names[number % len(names) :] + names[: number % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time() + seconds_of_group(group)
            answers[name] = by_name[name]()
            if number:
                walls[name].append(time.perf_counter() - wall)
                processors[name].append(time.process_time() + seconds_of_group(group) - cpu)
    results: dict[str, float] = {}
    for name in names:
        for clock, seconds in (("second", walls), ("processor second", processors)):
            results[f"{name}: answers a {clock}"] = options.questions / statistics.median(seconds[name])
            ratios = [base / one for base, one in zip(seconds[names[0]], seconds[name], strict=True)]
            results[f"{name}: answers a {clock} / {names[0]}"] = statistics.median(ratios)
        equal = sum(a == b for a, b in zip(answers[names[0]], answers[name], strict=True))
        results[f"{name}: answers equal, of {options.questions}"] = equal
    return results


if __name__ == "__main__":
    main()
