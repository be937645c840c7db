"""``llm2clip bench-mllm`` with a real (tiny) LLaVA: plans, evaluates, scores, continues after
failures."""

import json
from pathlib import Path

import pytest
from llava_world import pope_folder
from PIL import Image

from llava_integration.evaluator.benchmarks.answers import read_jsonl
from llm2clip_plugin.contracts import ScoreFile, TowerCard

GOLDEN = Path(__file__).parents[2] / "golden" / "mllm"
QUICK = (
    "--device",
    "cpu",
    "--batch-size",
    "8",
    "--dtype",
    "float32",
    "--",
    "--max-new-tokens",
    "4",
    "--workers",
    "0",
)


@pytest.fixture(scope="module")
def checkpoint(world):
    folder = world.root / "llava-bench"
    world.stage("finetune", f"llm2clip:{world.towers['clip']}", folder)
    return folder


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24), (len(path.name) * 7 % 255, 90, 160)).save(path)
    return path


@pytest.fixture
def root(tmp_path):
    """An evaluation folder: POPE whole, GQA with a picture missing, VizWiz test."""
    root = tmp_path / "eval"
    pope_folder(root / "pope")
    gqa = list(read_jsonl(GOLDEN / "gqa" / "llava_gqa_testdev_balanced.jsonl"))
    write_lines(root / "gqa" / "llava_gqa_testdev_balanced.jsonl", gqa[:10])
    whole = json.loads(
        (GOLDEN / "gqa" / "data" / "testdev_balanced_questions.json").read_text()
    )
    (root / "gqa" / "data").mkdir()
    some = {row["question_id"]: whole[row["question_id"]] for row in gqa[:10]}
    (root / "gqa" / "data" / "testdev_balanced_questions.json").write_text(
        json.dumps(some)
    )
    for row in gqa[:9]:
        picture(root / "gqa" / "data" / "images" / row["image"])
    images = [
        picture(root / "vizwiz" / "test" / f"VizWiz_test_{number}.jpg").name
        for number in range(3)
    ]
    asked = {"text": "What is it?", "category": "default"}
    write_lines(
        root / "vizwiz/llava_test.jsonl",
        [{"question_id": n, "image": images[n], **asked} for n in range(3)],
    )
    (root / "scienceqa").mkdir()
    return root


@pytest.mark.slow
def test_bench_runs_the_benchmarks_found_and_continues_after_a_failure(
    world, checkpoint, root, tmp_path
):
    output = tmp_path / "out"
    command = (
        "-m",
        "llm2clip_plugin.cli",
        "bench-mllm",
        "--model-path",
        checkpoint,
        "--data",
        root,
    )
    command += ("--output", output)
    printed = world.forked(*command, *QUICK, fails=True)
    outcomes = {
        row["name"]: row for row in json.loads((output / "bench.json").read_text())
    }
    assert [name for name, row in outcomes.items() if row["status"] == "scored"] == [
        "pope"
    ], printed
    assert outcomes["gqa"]["status"] == "failed"
    assert "cannot read" in outcomes["gqa"]["detail"]
    assert outcomes["vizwiz"]["status"] == "answered"
    assert "to be scored by its server" in outcomes["vizwiz"]["detail"]
    for name in (
        "scienceqa",
        "vqav2",
        "mme",
        "seedbench",
        "mmvet",
        "llava_bench",
        "textvqa",
        "mmbench",
    ):
        assert outcomes[name]["status"] == "no files", name
        assert outcomes[name]["detail"], name
    assert len(json.loads((output / "submissions" / "vizwiz.json").read_text())) == 3

    record = ScoreFile.read(output / "scores" / "pope.scores.json")
    assert record.counts["questions"] == len(record.items) > 15
    assert record.counts["missing"] == 0
    card = TowerCard.read(world.towers["clip"] / TowerCard.FILE)
    assert record.provenance["tower_sha256"] == card.weights_sha256
    assert {
        "checkpoint",
        "data_sha256",
        "question_file_sha256",
        "command",
        "versions",
        "llm",
    } <= set(record.provenance)
    assert "torch" in record.provenance["versions"]

    written = (output / "answers" / "pope.jsonl").stat().st_mtime_ns
    last = read_jsonl(root / "gqa" / "llava_gqa_testdev_balanced.jsonl")[-1]
    picture(root / "gqa" / "data" / "images" / last["image"])
    printed = world.forked(*command, *QUICK)
    outcomes = {
        row["name"]: row for row in json.loads((output / "bench.json").read_text())
    }
    assert outcomes["gqa"]["status"] == "scored", printed
    assert written == (output / "answers" / "pope.jsonl").stat().st_mtime_ns
    assert ScoreFile.read(output / "scores" / "gqa.scores.json").model == "llava-bench"

    scores = output / "scores"
    report = tmp_path / "report"
    world.forked(
        "-m",
        "llava_integration.evaluator.compare.command",
        scores,
        scores,
        "--output",
        report,
    )
    assert (report / "compare.html").stat().st_size > 10_000
