"""How long training waits for a checkpoint, and what hashing it costs.

    python scripts/bench_checkpoint.py --folder /path/on/the/disk --rounds 5

Two ways save the same engine (ZeRO-0, fp32, AdamW, a moving average) in turns: "waiting", as in version 0.1 (copy,
safetensors' save_file, rename), and "background". Prints one JSON line: size; median seconds that training waits, each
way; seconds until the background write is on disk, with and without training; processor seconds of writing and of
hashing; seconds of a training step with and without a write in progress; seconds to check the hashes and to load all
tensors, both with cached files.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench import alternate, argument_parser, median_seconds, timed
from bench_step import make_batch, make_dual, our_step
from safetensors.torch import save_file
from torch import Tensor

from llm2clip_plugin.contracts import sha256_file
from llm2clip_plugin.train.checkpoint import AVERAGES, MODEL, OPTIMIZER, TrainState, load, verify, write_checkpoint
from llm2clip_plugin.train.ema import MovingAverage
from llm2clip_plugin.train.engine import Engine, start_ranks
from llm2clip_plugin.train.run_checkpoints import Checkpoints
from llm2clip_plugin.train.saving import Saver


def main() -> None:
    """Measure one tower and print its line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--tower", default="vit-b", choices=["tiny", "vit-s", "vit-b"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where to write; a temporary folder by default")
    options = parser.parse_args()
    start_ranks()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print(json.dumps(measure(options.tower, options.batch, options.rounds, Path(folder))), flush=True)


def measure(tower: str, batch: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Both ways in turns, then the parts of the background write."""
    step = our_step(make_dual(tower), batch)
    engine = step.engine
    average = MovingAverage(engine, 0.9)
    batches = make_batch(batch)
    step(batches)  # makes the moments
    numbers = iter(range(1, 1000))
    events: list[dict[str, Any]] = []
    saver = Saver(Checkpoints(folder / "run", keep=1), engine, average, event=events.append)
    busy_steps: list[float] = []

    def background() -> float:
        saver.save(new_state(next(numbers)))
        while saver.busy:
            busy_steps.append(timed(lambda: step(batches)).wall)
        return saver.waited

    def waiting() -> float:
        start = time.perf_counter()
        save_as_0_1(folder / "old", engine, average)
        return time.perf_counter() - start

    runs = alternate({"waiting": waiting, "background": background}, rounds)
    idle_steps = [timed(lambda: step(batches)).wall for _ in range(3 * rounds)]
    saver.finish()
    path = saver.checkpoints.latest()
    assert path is not None
    loaded = load(path)
    tensors = {MODEL: dict(loaded.weights), OPTIMIZER: dict(loaded.moments), AVERAGES: dict(loaded.averages)}
    writing = [timed(lambda: write_checkpoint(folder / "alone", loaded.state, tensors)) for _ in range(rounds)]
    files = [path / name for name in load(path).state.files]
    hashing = alternate(
        {"sha256": lambda: [sha256_file(file) for file in files], "blake2b": lambda: list(map(blake2b, files))}, rounds
    )
    checking = alternate({"verify": lambda: verify(path), "load": lambda: read_all(path)}, rounds)
    sha256, write = median_seconds(hashing["sha256"], "cpu"), median_seconds(writing, "cpu")
    return {
        "cores": os.cpu_count(),
        "gigabytes": sum(file.stat().st_size for file in files) / 1e9,
        "waited_0_1": median(run.result for run in runs["waiting"]),
        "waited_now": median(run.result for run in runs["background"]),
        "write_seconds_alone": median_seconds(writing, "wall"),
        "write_seconds_while_training": median(event["write_seconds"] for event in events[1:]),
        "write_processor_seconds": write,
        "sha256_processor_seconds": sha256,
        "sha256_share_of_write": sha256 / write,
        "blake2b_processor_seconds": median_seconds(hashing["blake2b"], "cpu"),
        "step_seconds": median(idle_steps),
        "step_seconds_while_writing": median(busy_steps),
        "verify_seconds": median_seconds(checking["verify"], "wall"),
        "verify_processor_seconds": median_seconds(checking["verify"], "cpu"),
        "load_seconds": median_seconds(checking["load"], "wall"),
        "load_processor_seconds": median_seconds(checking["load"], "cpu"),
    }


def new_state(step: int) -> TrainState:
    """A state of this step."""
    return TrainState(step=step, samples=step, config={}, config_hash="", seed=0)


def save_as_0_1(target: Path, engine: Engine, average: MovingAverage) -> None:
    """What version 0.1 did while training waited: new copies, safetensors, no hash, no flush."""

    def copy(name: str, value: Tensor, dtype: Any = None) -> Tensor:
        return value.detach().to("cpu", dtype or value.dtype, copy=True)

    states: Any = (("model", engine.weights), ("optimizer", engine.moments), ("ema", average.values))
    tensors = {name: read(copy) for name, read in states}
    temporary = target.with_suffix(".tmp")
    temporary.mkdir()
    for name, values in tensors.items():
        save_file({key: value.contiguous() for key, value in values.items()}, temporary / f"{name}.safetensors")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def blake2b(path: Path) -> str:
    """The other fast hash of Python's standard library."""
    digest = hashlib.blake2b()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_all(path: Path) -> None:
    """Read every tensor once."""
    loaded = load(path)
    for tensors in (loaded.weights, loaded.moments, loaded.averages):
        for name in tensors:
            tensors[name]


if __name__ == "__main__":
    main()
