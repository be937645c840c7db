"""Commands on many shards under a low limit of open files: time, and the most that any process had open or mapped.

    python -m benchmarks.shards --llm DIR --tower DIR --shards 200 20000 --open-files 1024

For each number of shards: tars of one sample are embedded twice (the second time nothing is left to do), checked,
trained on by two ranks with two loader processes each, and evaluated. Nothing may grow with the number of shards.
"""

import argparse
import io
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from benchmarks.common import parser

ROOT = Path(__file__).parents[1]


def write_tars(folder: Path, count: int) -> None:
    """Tars of one tiny image with a caption each."""
    folder.mkdir(parents=True)
    image = io.BytesIO()
    Image.new("RGB", (16, 16)).save(image, "JPEG")
    for shard in range(count):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for suffix, body in (("jpg", image.getvalue()), ("txt", f"picture {shard}".encode())):
                member = tarfile.TarInfo(f"{shard:09d}.{suffix}")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))


def commands(args: argparse.Namespace, data: Path) -> dict[str, list[str]]:
    """Each command, in the order in which one needs the other's files."""
    ours, run = [sys.executable, "-m", "llm2clip_plugin.cli"], data.parent / f"run-{data.name}"
    embed = [*ours, "embed", str(data), "--llm", args.llm, "--cache", str(data / "cache")]
    train = f"--recipe quickstart --tower {args.tower} --image-size {args.image_size} --data {data} --workers 2"
    train += f" --cache {data}/cache --output {run} --max-steps 20 --heads.steps 0 --global-batch 64"
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", str(ROOT / "scripts/train_tower.py")]
    score = ["--cache", str(data / "cache"), "--resamples", "0", "--json", str(run / "scores.json")]
    return {
        "embed": embed,
        "embed again": embed,
        "data check": [*ours, "data", "check", str(data)],
        "train-tower, 2 ranks x 2 workers": [*launcher, *train.split(), "--evaluation.group="],
        "evaluate": [*ours, "evaluate", str(run / "tower"), "--data", str(data), *score],
    }


def run(words: Sequence[str], open_files: int, log: Path) -> tuple[int, int]:
    """The most open files and memory maps of any process of a command. Raises RuntimeError if it fails."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))

    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    files = maps = 0
    with open(log, "w") as file:
        process = subprocess.Popen(words, env=environment, stdout=file, stderr=file, preexec_fn=limit)
        while process.poll() is None:
            for pid in [process.pid, *descendants(process.pid)]:
                try:
                    files = max(files, len(os.listdir(f"/proc/{pid}/fd")))
                    maps = max(maps, len(Path(f"/proc/{pid}/maps").read_text().splitlines()))
                except OSError:
                    pass  # it has just ended
            time.sleep(0.25)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return files, maps


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and theirs."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [found for child in map(int, children) for found in (child, *descendants(child))]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--llm", required=True, help="folder of any LLM")
    options.add_argument("--tower", required=True, help="any tower directory")
    options.add_argument("--image-size", type=int, default=16, help="pixels, of the tower")
    options.add_argument("--shards", type=int, nargs="+", default=[200, 20_000])
    options.add_argument("--open-files", type=int, default=1024, help="soft and hard limit of every process")
    args = options.parse_args()
    print(f"ulimit -n {args.open_files}\n\n| command | shards | seconds | open files | maps |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for count in args.shards:
            data = Path(folder) / f"shards-{count}"
            write_tars(data, count)
            for name, words in commands(args, data).items():
                start = time.perf_counter()
                files, maps = run(words, args.open_files, Path(folder) / f"{count}-{name}.log")
                print(f"| {name} | {count:,} | {time.perf_counter() - start:.0f} | {files} | {maps} |", flush=True)


if __name__ == "__main__":
    main()
