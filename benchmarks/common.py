"""What the benchmarks share: ways that take turns, peak memory, made-up data and models, and one table.

Run a benchmark from the repository's folder: ``python -m benchmarks.step --help``.
"""

import argparse
import io
import json
import platform
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image

T = TypeVar("T")
WORDS = "a red bicycle leans against the brick wall of an old house near two sleeping dogs in the evening rain".split()


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that describes itself with a module's docstring, with the option of every benchmark."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=5, help="timed runs of each way")
    return made


# ------------------------------------------------------------------------------------------- measurements


class Run(NamedTuple):
    """One timed call and its result."""

    wall: float  # seconds
    cpu: float  # processor seconds, which other programs hardly disturb
    result: Any

    @property
    def seconds(self) -> float:
        """Wall time if there is a GPU, else processor time."""
        return self.wall if torch.cuda.is_available() else self.cpu


def timed(work: Callable[[], Any]) -> Run:
    """Call ``work`` and wait until the GPU has finished."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    wait()
    return Run(time.perf_counter() - wall, time.process_time() - cpu, result)


def alternate(ways: Mapping[str, Callable[[], Any]], rounds: int, *, warm_up: bool = True) -> dict[str, list[Run]]:
    """Time every way once a round, each round starting with the next way; an additional first round is not counted."""
    names = list(ways)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(rounds + warm_up):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            run = timed(ways[name])
            if number >= warm_up:
                runs[name].append(run)
    return runs


def peak_growth(work: Callable[[], T]) -> tuple[int, T]:
    """Bytes of peak memory during ``work`` above the memory before: the GPU's, or this process's (Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        return torch.cuda.max_memory_allocated() - before, result
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _process_memory("VmRSS")
    result = work()
    return _process_memory("VmHWM") - before, result


def _process_memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024  # from kB


def in_new_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a module-level function in a new Python process; its peak memory is not affected by this one."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def alternate_processes(
    measure: Callable[..., tuple[int, Run]], ways: Iterable[str], args: argparse.Namespace
) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """The runs of ``measure(way, args)``, each in a new process, way by way; and the MiB of each way's peak."""
    rounds = [{way: in_new_process(measure, way, args) for way in ways} for _ in range(args.rounds)]
    runs = {way: [one[way][1] for one in rounds] for way in rounds[0]}
    return runs, {way: f"{max(one[way][0] for one in rounds) / 2**20:,.0f}" for way in runs}


# -------------------------------------------------------------------------------------------------- table


def print_table(
    about: str,
    runs: Mapping[str, Sequence[Run]],
    *,
    amount: float,
    unit: str,
    clock: str = "seconds",
    columns: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Markdown: ``amount`` of ``unit`` per second of each way, and its speed against the first, round by round.

    Ratios: median [lowest, highest]. ``columns``: title -> way -> cell, in addition.
    """
    columns, base = columns or {}, next(iter(runs.values()))
    device = "wall" if clock == "wall" else "GPU" if torch.cuda.is_available() else "CPU"
    print(f"\n{about}; {machine()}\n")
    print(f"| way | {unit} / s ({device}) | ratio |", end="")
    print("".join(f" {title} |" for title in columns))
    print("|---" * (3 + len(columns)) + "|")
    for name, timed_runs in runs.items():
        seconds = [getattr(run, clock) for run in timed_runs]
        ratios = [getattr(b, clock) / s for b, s in zip(base, seconds, strict=True)]
        spread = f"{median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        cells = "".join(f" {of_way.get(name, '')} |" for of_way in columns.values())
        print(f"| {name} | {amount / median(seconds):,.4g} | {spread} |{cells}", flush=True)


def machine() -> str:
    """The device, its threads, and torch's version."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"


# --------------------------------------------------------------------------------------- data and models


def write_shard(folder: Path, count: int, *, side: int = 512, quality: int = 95) -> Path:
    """A tar of ``count`` JPEGs with a caption each, as img2dataset writes them."""
    rng, path = np.random.default_rng(0), folder / "00000.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            body = io.BytesIO()
            photo_like(rng, side).save(body, "JPEG", quality=quality)
            for suffix, content in (("jpg", body.getvalue()), ("txt", f"caption {number}".encode())):
                member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def photo_like(rng: np.random.Generator, side: int) -> Image.Image:
    """Colored noise whose amplitude falls as f^-1.45: its JPEG is about as large as a photograph's."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    frequency[0, 0] = 1
    fields = [np.fft.ifft2(np.fft.fft2(rng.standard_normal((side, side))) / frequency**1.45).real for _ in range(3)]
    fields = [(field - field.mean()) / field.std() for field in fields]
    pixels = np.stack([0.8 * fields[0] + 0.3 * field for field in fields], axis=-1) * 45 + 120
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def random_llama(folder: Path) -> Path:
    """A Llama of 8 blocks of width 256 with random weights, and a byte-level tokenizer."""
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = ByteLevelBPETokenizer(add_prefix_space=True)
    tokens: Any = [*specials.values()]
    tokenizer.train_from_iterator([" ".join(WORDS)], min_frequency=0, show_progress=False, special_tokens=tokens)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": tokenizer.get_vocab_size()}
    LlamaForCausalLM(LlamaConfig.from_dict({**sizes, **ids})).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **specials).save_pretrained(folder)
    return folder


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
