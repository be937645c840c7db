"""llm2clip run after changes of data, options and places, and after kills: what it makes is what a
fresh run makes.

Bytes are compared, but for what says where and how long: paths, times and versions in cards and
records. More sequences: RERUN_SEQUENCES=20 pytest tests/stages/test_reruns.py
"""

import hashlib
import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from forked import Module
from forked_python import programs
from own_photos import COLORS, PLACES, draw
from tiny_data import encoded, make_tower, write_tar
from tiny_llm import save_tiny_llm
from tiny_reading import make_reading
from tower_runs import environment

from llm2clip_plugin.contracts import EncoderCard
from llm2clip_plugin.evaluate.config import PROMPT_EOL

pytestmark = pytest.mark.slow
SEQUENCES = int(os.environ.get("RERUN_SEQUENCES", "1"))
OPERATIONS = 5
DATA = "photos-tars"
STAGES = 11
SECONDS = 300  # of one run


def hold() -> None:
    """In a stage's process: a training waits before its fourth step while the working directory has
    a file "hold"."""
    if not Path("hold").exists():
        return
    from llm2clip_plugin.stages.run import TrainingRun

    train_to_end = TrainingRun.train_to_end

    def held(batches: Iterator[Any]) -> Iterator[Any]:
        for number, batch in enumerate(batches):
            while number == 3 and Path("hold").exists():
                time.sleep(0.05)
            yield batch

    TrainingRun.train_to_end = lambda self, *a, batches, **o: train_to_end(
        self, *a, batches=held(batches), **o
    )


def use_forked_python(path: str) -> None:
    """In the process of `run`: the stages that it starts are forked as well."""
    sys.executable = path


class World:
    """A folder with data, models and a run, as a user changes them."""

    def __init__(
        self,
        folder: Path,
        samples: dict[str, tuple[str, bytes, dict[str, str]]],
        output: str,
    ) -> None:
        self.folder = folder
        self.samples = samples  # key -> (tar, picture, captions)
        self.output = output
        self.options = {"--num-train-epochs": "1", "--reading": "reading"}

    def write_data(self) -> None:
        """Write the tars whose samples changed."""
        for tar in ("00000", "00001"):
            members: list[tuple[str, bytes]] = []
            for key, (tar_of_sample, picture, captions) in self.samples.items():
                if tar_of_sample == tar:
                    members += [
                        (f"{key}.jpg", picture),
                        (f"{key}.json", json.dumps(captions).encode()),
                    ]
            new = write_tar(self.folder / "new.tar", members)
            old = self.folder / DATA / f"{tar}.tar"
            old.parent.mkdir(exist_ok=True)
            if not old.is_file() or old.read_bytes() != new.read_bytes():
                os.replace(new, old)

    def start(self, output: str = "", *more: str) -> Module:
        words = [
            "run",
            DATA,
            "--llm",
            "llm",
            "--tower",
            "tower",
            "--output",
            output or self.output,
        ]
        words += [
            "--validation",
            "0.25",
            "--tower-options=--heads.steps 2 --save_steps 2 --heads.batch 8",
        ]
        words += [word for pair in self.options.items() for word in pair]
        variables = {"LLM2CLIP_HOME": str(self.folder / "home"), "HF_HUB_OFFLINE": "1"}
        first = partial(use_forked_python, str(programs(hold) / "python"))
        return Module(
            "llm2clip_plugin.cli",
            [*words, *more],
            environment(**variables),
            self.folder,
            first,
        )

    def run(self, output: str = "", *more: str) -> str:
        """Run to the end; what was printed."""
        process = self.start(output, *more)
        assert process.wait(SECONDS) == 0, process.output
        return process.output

    def kill(self, stage: int) -> None:
        """Run until a stage has begun, and kill the run."""
        process = self.start()
        while process.poll() is None and f"\n[{stage}/{STAGES}]" not in process.output:
            time.sleep(0.02)
        self.end(process)

    def kill_in_training(self) -> None:
        """Kill a run after the first checkpoint of stage 2."""
        (self.folder / "hold").touch()
        process = self.start()
        saved = self.folder / self.output / "after" / "checkpoints" / "latest"
        while not (f"\n[7/{STAGES}]" in process.output and saved.exists()):
            assert process.poll() is None, process.output
            time.sleep(0.02)
        self.end(process)
        (self.folder / "hold").unlink()

    def end(self, process: Module) -> None:
        """End all processes of a run at once, as when a machine goes down."""
        if process.poll() is None and process.pid:
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for child in children:
                child.kill()
            process.wait(SECONDS)
        while any(self.processes()):  # what forks for the children learns of their end
            time.sleep(0.05)

    def processes(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            try:
                if Path(process.cwd()) == self.folder:
                    yield process
            except psutil.Error:
                continue


def sample(rng: random.Random) -> tuple[str, bytes, dict[str, str]]:
    """A picture with a short and a long caption."""
    size = rng.choice(["small", "large"])
    color = rng.choice(list(COLORS))
    side = rng.choice(list(PLACES))
    number = rng.randrange(10**6)
    picture = encoded(draw(size, color, "circle", side, rng).convert("RGB"), quality=90)
    long = f"A {size} circle of {color} ink, number {number}, drawn {side} of paper."
    return (
        rng.choice(["00000", "00001"]),
        picture,
        {"caption": f"{size} {color} {number}", "long_caption": long},
    )


def change(world: World, operation: str, rng: random.Random) -> None:
    key = rng.choice(list(world.samples))
    if operation == "edit":
        tar, picture, captions = world.samples[key]
        world.samples[key] = (
            tar,
            picture,
            captions | {"caption": captions["caption"][::-1]},
        )
    elif operation == "add":
        for _ in range(3):
            world.samples[f"new{rng.randrange(10**6)}"] = sample(rng)
    elif operation == "remove":
        del world.samples[key]
    elif operation == "rename":
        world.samples = {
            (f"{name}x" if name == key else name): value
            for name, value in world.samples.items()
        }
    elif operation == "kill":
        world.kill(rng.randint(1, STAGES))
    elif operation == "move":
        moved = f"moved-{rng.randrange(10**6)}"
        if (world.folder / world.output).exists():
            (world.folder / world.output).rename(world.folder / moved)
            world.output = moved
    elif operation == "option":
        world.options["--num-train-epochs"] = rng.choice(["1", "2"])
        world.options["--reading"] = rng.choice(["reading", "moved-reading"])
    else:
        assert operation == "run"
        world.run()
    world.write_data()


# What says where, when and by which release: paths and times, not results.
PLACELESS = ("model", "provenance", "versions", "origin", "teacher", "training", "base")


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: plain(item) for name, item in value.items() if name not in PLACELESS
        }
    return [plain(item) for item in value] if isinstance(value, list) else value


def results(out: Path) -> dict[str, str]:
    """Digest of every result of a run."""
    kinds = (
        "data/*/*.tar",
        "embeddings/**/*.safetensors",
        "llm/adapter/*.safetensors",
        "tower/**/*.safetensors",
    )
    paths = [
        path
        for kind in (*kinds, "before/tower/*.safetensors", "after/tower/*.safetensors")
        for path in out.glob(kind)
    ]
    content_of = {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }
    for name in (
        "before/validation.scores.json",
        "after/validation.scores.json",
        "after/tower/llm2clip.json",
    ):
        content_of[name] = json.dumps(
            plain(json.loads((out / name).read_text())), sort_keys=True
        )
    manifest = json.loads((out / "embeddings" / "train" / "manifest.json").read_text())
    content_of["manifest"] = json.dumps(plain(manifest), sort_keys=True)
    page = (out / "index.html").read_text().replace(out.name, "OUT")
    content_of["page"] = re.sub(r"(?<=, )\d+ s: ", "", page)
    return content_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A complete run on 28 pictures."""
    folder = tmp_path_factory.mktemp("reruns")
    save_tiny_llm(folder / "llm", "llama")
    make_tower(folder / "tower")
    for name in ("reading", "moved-reading"):
        make_reading(folder / name, folder / "llm")
    rng = random.Random(0)
    world = World(
        folder, {f"{number:03d}": sample(rng) for number in range(28)}, "run-0"
    )
    world.write_data()
    world.run()
    adapter = EncoderCard.read(folder / "run-0" / "llm" / "adapter" / EncoderCard.FILE)
    assert (adapter.pooling, adapter.layer) == ("last", -1)
    assert adapter.chat_template == PROMPT_EOL
    return world


def copy_of(base: World, folder: Path) -> World:
    shutil.copytree(base.folder, folder, dirs_exist_ok=True)
    return World(folder, dict(base.samples), "run-0")


def test_a_killed_training_goes_on_in_a_moved_folder_but_not_with_other_data(
    base: World, tmp_path: Path
):
    world = copy_of(base, tmp_path / "world")
    other = copy_of(base, tmp_path / "other")
    world.options["--num-train-epochs"] = other.options["--num-train-epochs"] = "3"
    world.kill_in_training()
    change(world, "move", random.Random(0))
    said = world.run()
    assert "--allow-changed data.path" in said
    assert "runs again" not in said
    metrics = (
        (world.folder / world.output / "after" / "metrics.jsonl")
        .read_text()
        .splitlines()
    )
    assert [json.loads(line)["step"] for line in metrics].count(
        1
    ) == 1  # it did not start over
    other.run()
    assert results(world.folder / world.output) == results(other.folder / other.output)

    world.options["--num-train-epochs"] = "4"
    world.kill_in_training()
    change(world, "edit", random.Random(0))
    world.run()
    world.run("fresh")
    assert results(world.folder / world.output) == results(world.folder / "fresh")


@pytest.mark.parametrize("seed", range(SEQUENCES))
def test_after_any_changes_a_run_makes_what_a_fresh_one_makes(
    base: World, tmp_path: Path, seed: int
):
    rng = random.Random(seed)
    world = copy_of(base, tmp_path / "world")
    done: list[str] = []
    for _ in range(OPERATIONS):
        done.append(
            rng.choice(
                ["edit", "add", "remove", "rename", "kill", "move", "option", "run"]
            )
        )
        print(done[-1], flush=True)
        change(world, done[-1], rng)
    said = world.run()
    fresh = world.run("fresh")
    assert "stages to run" in said
    assert "11 of 11 stages to run" in fresh
    assert results(world.folder / world.output) == results(world.folder / "fresh"), done
