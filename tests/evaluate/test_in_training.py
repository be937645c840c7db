"""What a run measures at every evaluation, on two ranks: suites, zero-shot, and the pictures that
W&B and TensorBoard show."""

import dataclasses
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_world import square, write_llm
from test_suites import NAMES, write_suites
from tiny_data import make_shards, make_tower
from tower_runs import finish, lines, start

from llm2clip_plugin.cli import run
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.evaluate.in_training import Evaluation, MeasuredSuite, embed_suites
from llm2clip_plugin.status import run_rows

HEADS = ("--heads.steps", "2", "--heads.batch-size", "16")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llm, tower, data with the LLM's cache, suites, classes."""
    folder = tmp_path_factory.mktemp("during")
    write_llm(folder / "llm")
    make_tower(folder / "tower")
    make_shards(folder / "data")
    write_suites(folder / "suites")
    for number, name in enumerate(NAMES):
        (folder / "classes" / name).mkdir(parents=True)
        (folder / "classes" / name / "0.png").write_bytes(square(name, 10 * number))
    assert run("embed", [str(folder / "data"), "--llm", str(folder / "llm")]) == 0
    return folder


def words(world: Path, output: Path, *more: str) -> list[str]:
    data = str(world / "data")
    return [
        *(
            data,
            "--tower",
            str(world / "tower"),
            "--validation",
            data,
            "--precision",
            "fp32",
            "--global-batch",
            "16",
        ),
        *(
            "--workers",
            "0",
            "--max-steps",
            "4",
            "--eval-steps",
            "2",
            "--output",
            str(output),
            *HEADS,
            *more,
        ),
    ]


def test_suites_and_pictures_at_every_evaluation(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in {
        "MODE": "offline",
        "DIR": str(tmp_path),
        "SILENT": "true",
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    suites = (
        "--evaluate-suites",
        "flickr30k",
        "sugarcrepe",
        "--suites-root",
        str(world / "suites"),
    )
    output = tmp_path / "run"
    zeroshot = ("--evaluate-zeroshot", str(world / "classes"))
    argv = words(
        world, output, *suites, *zeroshot, "--report_to", "tensorboard", "wandb"
    )
    ranks = start(argv, 2)
    assert finish(ranks) == [0, 0], ranks[0].output[-3000:]
    assert (
        f"embedding the texts of sugarcrepe once, with {world / 'llm'}"
        in ranks[0].output
    )
    names = (
        "i2t_r1",
        "flickr30k/t2i_r5",
        "sugarcrepe/swap_att",
        "sugarcrepe/mean",
        "zeroshot/acc1",
    )
    evaluations = [line for line in lines(output) if names[0] in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    assert all(0 <= line[name] <= 1 for line in evaluations for name in names)
    row_of = dict(run_rows(output))
    assert {"i2t_r1", "flickr30k/i2t_r1", "sugarcrepe/mean", "zeroshot/acc1"} <= set(
        row_of
    )
    # the commands give the exported tower the same scores, with the texts that the run has embedded
    suite = [
        str(output / "tower"),
        str(world / "suites"),
        "--suite",
        "flickr30k",
        "--output",
        str(tmp_path),
    ]
    assert run("evaluate", suite) == 0
    assert (
        run(
            "evaluate zeroshot",
            [
                str(output / "tower"),
                str(world / "classes"),
                "--output",
                str(tmp_path / "zero"),
            ],
        )
        == 0
    )
    for name, path in (("flickr30k", "flickr30k.scores.json"), ("zeroshot", "zero")):
        for metric, value in ScoreFile.read(tmp_path / path).metrics.items():
            assert evaluations[-1][f"{name}/{metric}"] == pytest.approx(
                value, abs=1e-6
            ), (
                name,
                metric,
            )
    check_tensorboard(output)
    check_wandb(tmp_path)


def check_tensorboard(output: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "monitor" / "run"))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/flickr30k/i2t_r1")] == [
        0,
        32,
        64,
    ]
    for name in ("eval/best", "eval/worst"):
        assert [
            (image.step, image.width, image.height) for image in events.Images(name)
        ] == [(step, 4 * 224, 2 * 224) for step in (0, 32, 64)]


def check_wandb(folder: Path) -> None:
    """A record a step, and the pictures with their texts."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    history = []
    for record in records(path.read_bytes()):
        if record.HasField("history"):
            of_step = {
                (item.key or "/".join(item.nested_key)): item.value_json
                for item in record.history.item
            }
            history.append({name: json.loads(value) for name, value in of_step.items()})
    assert [items["_step"] for items in history] == [0, 16, 32, 48, 64]
    for items in history[::2]:
        assert items["eval/best/width"] == 4 * 224
        assert "place 1: " in items["eval/best/caption"]
        assert {
            "eval/worst/path",
            "eval/i2t_r1",
            "eval/sugarcrepe/mean",
        } <= items.keys()
    assert "train/loss" in history[1]
    assert "eval/best/path" not in history[1]


def records(data: bytes) -> Iterator[Any]:
    """Of W&B's file, in LevelDB's format: blocks of 32 KiB; a record's parts have a checksum, a
    length and a type."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue] - generated

    offset = 7
    body = b""
    while offset + 7 <= len(data):
        if (left := 32768 - offset % 32768) < 7:
            offset += left
            continue
        length, kind = struct.unpack_from("<HB", data, offset + 4)
        body += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(body)
            body = b""


def test_a_suite_without_files_is_named_before_the_run(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for more, named in (
        (
            ("--evaluate-suites", "coco", "--suites-root", str(tmp_path)),
            f"{tmp_path}/coco/dataset_coco.json",
        ),
        (
            ("--evaluate-suites", "coco", "--suites-root", str(tmp_path), "--dry-run"),
            "dataset_coco.json",
        ),
        (("--evaluate-suites", "coco"), "--suites-root"),
        (("--evaluate-suites", "cocoa", "--suites-root", str(tmp_path)), "cocoa"),
    ):
        assert run("train-tower", words(world, tmp_path / "run", *more)) == 2
        assert named in capsys.readouterr().err
    assert not (tmp_path / "run/metrics.jsonl").exists()
    of_held_out = (
        "--evaluate-zeroshot",
        str(world / "classes"),
        "--evaluation.limit",
        "2",
        "--output",
        str(tmp_path),
    )
    assert (
        run(
            "train-tower",
            [str(world / "data"), "--tower", str(world / "tower"), *of_held_out],
        )
        == 2
    )
    assert "--evaluation.limit" in capsys.readouterr().err


def test_whose_texts_are_embedded_where(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Not by another LLM than the training's; those in a read-only folder elsewhere."""
    teacher = EmbeddingCache.open(next((world / "data").glob("embeddings-*"))).teacher
    shutil.copytree(
        world / "data", tmp_path / "data", ignore=shutil.ignore_patterns("embeddings-*")
    )
    nothing: Any = None
    texts = open_source(SourceConfig(path=str(tmp_path / "data")))
    benchmark = MeasuredSuite("one", texts, nothing)
    with pytest.raises(ContractError, match=re.escape(teacher.llm)):
        embed_suites([benchmark], dataclasses.replace(teacher, weights_sha256="0" * 64))
    monkeypatch.setenv("LLM2CLIP_CACHE", str(tmp_path / "downloads"))
    # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "data")
    (suite,) = embed_suites([benchmark], teacher)
    assert suite.cache is not None
    assert suite.cache.directory.is_relative_to(tmp_path / "downloads")
    assert not list((tmp_path / "data").glob("embeddings-*"))


def test_evaluations_leave_compiling_to_the_training():
    graphs: list[int] = []
    double = torch.compile(
        lambda x: 2 * x,
        backend=lambda module, inputs: graphs.append(1) or module.forward,
    )

    def measure(*args: Any, **how: Any) -> ScoreFile:
        return ScoreFile(
            benchmark="", metrics={"mean": float(double(torch.ones(1)))}, items=[]
        )

    nothing: Any = None
    suite = MeasuredSuite("one", nothing, measure)
    assert Evaluation(RetrievalConfig(), nothing, [suite])(nothing, nothing) == {
        "one/mean": 2.0
    }
    assert not graphs
    assert double(torch.ones(1)) == 2.0
    assert graphs
