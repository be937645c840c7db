"""Faults of settings, weights, checkpoints and folders: refused before step 1, or resumed from what
is whole."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from planted_faults import Fault, World, copied, flip, halve, meet, rows, set_weight
from tiny_data import make_cache

from llm2clip_plugin.cli import main
from llm2clip_plugin.contracts import RunRecord
from llm2clip_plugin.train.checkpoint import (
    AVERAGES,
    MODEL,
    OPTIMIZER,
    load,
    write_checkpoint,
)

LAST = "run/checkpoints/step-00000004"
BEFORE = "run/checkpoints/step-00000002"
AT = "{w}/" + LAST
HELD_OUT = "--data.validation {w}/data"
AGAIN = "--output_dir {w}/run --train.ema-decay 0.9 --save_total_limit 2"  # the run's command


@pytest.fixture(scope="module")
def finished(
    whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A world with a finished run, its last checkpoint and the one before, and a copy of it."""
    world = copied(whole, tmp_path_factory.mktemp("finished") / "w")
    assert main(world.train(f"{AGAIN} {HELD_OUT}")) == 0
    assert all(world.path(name).is_dir() for name in (BEFORE, LAST))
    return world.folder, copied(world.folder, world.folder.with_name("copy")).folder


@pytest.fixture
def trained(finished: tuple[Path, Path]) -> World:
    """The finished run as it was, under the paths that it has recorded."""
    folder, copy = finished
    shutil.rmtree(folder)
    return copied(copy, folder)


def without_cache(world: World) -> None:
    shutil.copytree(
        world.path("data"),
        world.path("other"),
        ignore=shutil.ignore_patterns("embeddings-*"),
    )


def another_teacher(world: World) -> None:
    without_cache(world)
    make_cache(world.path("other"), llm="another")


def nan_in_tower(world: World) -> None:
    set_weight(world.path("tower/model.safetensors"), "fc1.weight", float("nan"))


def auto_steps(world: World) -> None:
    world.path("zero.json").write_text('{"steps_per_print": "auto"}')


ONE_SOURCE = "--data.path {w}/data {w}/data --one-source-per-batch --global-batch 64"
OWN_NEGATIVES = "--global-batch 999 --loss.no-mask-same-image"
NO_KIND = "--data.caption-weights lng=1 --data.read.kinds lng"


@rows(
    Fault(
        "field that the data lacks",
        f"{HELD_OUT} --evaluation.group concept",
        "...--evaluation.group concept...",
    ),
    Fault(
        "validation without a cache",
        "--data.validation {w}/other",
        "...llm2clip embed {w}/other...",
        without_cache,
    ),
    Fault(
        "another teacher",
        "--data.validation {w}/other",
        "{w}/other/...fingerprint...",
        another_teacher,
    ),
    Fault("kind without captions to train on", NO_KIND, "...lng...known: long, short"),
    Fault(
        "samples as their own negatives",
        OWN_NEGATIVES,
        "--global-batch 999 ...48 samples...mask_same_image...",
    ),
    Fault(
        "source smaller than its batches",
        ONE_SOURCE,
        "--global-batch 64 ...--no-one-source-per-batch",
    ),
    Fault(
        "auto that nothing fills",
        "--deepspeed {w}/zero.json",
        "{w}/zero.json: ...steps_per_print...",
        auto_steps,
    ),
    Fault(
        "NaN in a start weight",
        "",
        "{w}/tower: 1 of the 2048 values of tower...fc1.weight ...",
        nan_in_tower,
    ),
)
def test_refused_before_step_1(
    fault: Fault, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    meet(fault, world, world.train(fault.words), capsys)
    assert not list(world.folder.glob("new/checkpoints/step-*"))
    assert not world.path("new/metrics.jsonl").exists()


def nan_in_checkpoint(world: World) -> None:
    """A checkpoint whose hashes are right and whose weights are not."""
    loaded = load(world.path(LAST))
    weights = dict(loaded.weights)
    weights["visual_projection.weight"][0, 0] = float("nan")
    tensors = {
        MODEL: weights,
        OPTIMIZER: dict(loaded.moments),
        AVERAGES: dict(loaded.averages),
    }
    write_checkpoint(world.path(LAST), loaded.state, tensors)


MORE = f"{AGAIN} --max_steps 6 --allow-changed train.max_steps"
FELL_BACK = "falling back to {w}/" + BEFORE


@rows(
    Fault(
        "flipped weight",
        MORE,
        AT + "/model.safetensors is damaged...",
        lambda w: flip(w.path(LAST) / MODEL),
    ),
    Fault(
        "missing weights",
        MORE,
        "..." + AT + "/model...",
        lambda w: (w.path(LAST) / MODEL).unlink(),
    ),
)
def test_resumed_from_the_checkpoint_before(
    fault: Fault, trained: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world = trained
    fault = dataclasses.replace(fault, status=0)
    output = meet(fault, world, world.train(fault.words), capsys)
    assert FELL_BACK.replace("{w}", str(world.folder)) in output
    record = RunRecord.read(world.path("run") / RunRecord.FILE)
    assert record.finished
    assert record.step == 6
    steps = [
        json.loads(line).get("step")
        for line in world.path("run/metrics.jsonl").read_text().splitlines()
    ]
    assert max(steps) == 6


def cut_all(world: World) -> None:
    for path in world.folder.glob("run/checkpoints/*/state.json"):
        halve(path)


@rows(
    Fault(
        "every state.json cut",
        MORE,
        "...{w}/run/checkpoints...4/state.json...2/state.json...--output",
        cut_all,
    ),
    Fault(
        "NaN in a checkpoint",
        MORE,
        AT + ": 1 of the ...visual_projection.weight...",
        nan_in_checkpoint,
    ),
    Fault(
        "resume from nowhere",
        f"{MORE} --resume {{w}}/nowhere",
        "--resume {w}/nowhere: ...",
    ),
    Fault(
        "a damaged one",
        f"{MORE} --resume {{w}}/{LAST}",
        AT + "/model...",
        lambda w: flip(w.path(LAST) / MODEL),
    ),
    Fault(
        "another learning rate",
        f"{AGAIN} --optim.lr 1e-3",
        AT + " was saved with other settings:",
    ),
    Fault(
        "never, over checkpoints",
        f"{AGAIN} --resume never",
        "{w}/run/checkpoints ...--resume never...",
    ),
)
def test_not_resumed(
    fault: Fault, trained: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world = trained
    before = {path: path.read_bytes() for path in world.path("run/tower").iterdir()}
    meet(fault, world, world.train(fault.words), capsys)
    assert before == {
        path: path.read_bytes() for path in world.path("run/tower").iterdir()
    }
