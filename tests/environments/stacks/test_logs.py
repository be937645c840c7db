"""Logs that today's evaluators write (``scripts/test.sh --stacks``): planted differences come back
from them."""

# The evaluators are in an environment of their own, not where types are checked.
# pyright: reportMissingImports=false

import json
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from llava_integration.compare import build, load_side

QUESTIONS = 240
RIGHT = {"weak": 50, "strong": 80}  # percent of the questions that a model answers


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Two questions about each image; of three, one is answered by "yes"."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = []
    for n in range(QUESTIONS):
        about = {"image_id": f"image{n // 2}", "category": "odd" if n % 2 else "even"}
        asked = {
            "question": f"Is {n} divisible by three?",
            "answer": "no" if n % 3 else "yes",
        }
        rows.append({"question_id": f"q{n}", **asked, **about})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(questions: Path) -> list[dict]:
    return [json.loads(line) for line in questions.open()]


def answer(model: str, row: dict) -> str:
    """The truth, for the model's share of the questions."""
    is_right = zlib.crc32(f"{model} {row['question']}".encode()) % 100 < RIGHT[model]
    return row["answer"] if is_right else {"yes": "no", "no": "yes"}[row["answer"]]


def accuracy(model: str, questions: Path) -> float:
    rows = rows_of(questions)
    return 100 * sum(answer(model, row) == row["answer"] for row in rows) / len(rows)


def check(folder: Path, questions: Path, benchmark: str) -> None:
    """Both numbers are exact, the difference is found; a side against itself shows none."""
    sides = [load_side(folder / model) for model in RIGHT]
    (row,) = build(sides).rows
    assert row.benchmark == benchmark
    assert row.questions == QUESTIONS
    assert row.images == QUESTIONS // 2
    assert (row.result.base, row.result.new) == pytest.approx(
        [accuracy(model, questions) for model in RIGHT]
    )
    assert row.verdict == "better"
    assert row.result.low <= row.result.difference <= row.result.high
    (same,) = build([sides[0], load_side(folder / "weak", "again")]).rows
    assert same.result.difference == 0
    assert same.verdict == "no difference shown"


def test_lm_evaluation_harness(questions, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    class Model(LM):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def generate_until(self, requests):
            return [answer(self.name, request.doc) for request in requests]

        def loglikelihood(self, requests):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    task = {
        "task": "toy",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
    }
    task |= {
        "test_split": "test",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"]},
    }
    task |= {"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    task["metric_list"] = [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    ]
    for name in RIGHT:
        results = simple_evaluate(
            Model(name), tasks=[task], task_manager=TaskManager(), log_samples=True
        )
        samples = results.pop("samples")
        tracker = EvaluationTracker(output_path=str(tmp_path / name))
        tracker.general_config_tracker.model_name_sanitized = name
        tracker.save_results_aggregated(results=results, samples=samples)
        tracker.save_results_samples(task_name="toy", samples=samples["toy"])
    check(tmp_path, questions, "toy exact_match")


def test_inspect_ai(questions, tmp_path):
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.model import ModelAPI, ModelOutput, modelapi
    from inspect_ai.scorer import match
    from inspect_ai.solver import generate

    rows = {row["question"]: row for row in rows_of(questions)}

    @modelapi("toy")
    class Model(ModelAPI):
        async def count_text_tokens(self, text):
            return len(text)  # the package's own fetches a tokenizer

        async def generate(self, input, tools, tool_choice, config):
            return ModelOutput.from_content(
                self.model_name, answer(self.model_name, rows[input[-1].text])
            )

    samples = []
    for row in rows.values():
        about = {"id": row["question_id"], "metadata": {"image_id": row["image_id"]}}
        samples.append(Sample(input=row["question"], target=row["answer"], **about))
    for name, form in zip(RIGHT, ("eval", "json"), strict=True):
        task = Task(name="toy", dataset=samples, solver=generate(), scorer=match())
        eval(
            task,
            model=f"toy/{name}",
            log_dir=str(tmp_path / name),
            log_format=form,
            display="none",
        )
    check(tmp_path, questions, "toy match")


def test_lmms_eval(questions, tmp_path):
    """Its own model that says one thing, and its own POPE: F1 of always "yes" is 50, of always "no"
    0."""
    import lmms_eval.tasks.pope as pope

    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "utils.py").write_text(
        "from lmms_eval.tasks.pope.utils import *\n\n\ndef none(doc):\n    return []\n\n\n"
        "def text(doc, kwargs=None):\n    return doc['question']\n"
    )
    (written,) = [path / "pope.yaml" for path in map(Path, pope.__path__)]
    yaml = written.read_text().replace("utils.pope_doc_to_visual", "utils.none")
    yaml = yaml.replace("utils.pope_doc_to_text", "utils.text").replace(
        'task: "pope"', 'task: "toy"'
    )
    lines = [
        "dataset_path: json" if line.startswith("dataset_path") else line
        for line in yaml.splitlines()
    ]
    lines = [
        line.replace("token: True", f"data_files: {{test: {questions}}}")
        for line in lines
    ]
    (folder / "toy.yaml").write_text("\n".join(lines))
    for said in ("no", "yes"):
        run = [
            sys.executable,
            "-m",
            "lmms_eval",
            "--model",
            "dummy",
            "--model_args",
            f"response={said}",
        ]
        run += ["--tasks", "toy", "--include_path", str(folder), "--batch_size", "1"]
        subprocess.run(
            [*run, "--log_samples", "--output_path", str(tmp_path / said)], check=True
        )
    (row,) = build([load_side(tmp_path / said) for said in ("no", "yes")]).rows
    assert row.benchmark == "pope"
    assert (row.result.base, row.result.new) == pytest.approx((0, 50))
    # newer versions log the image
    assert row.images == QUESTIONS // 2 or row.images == QUESTIONS
    assert row.verdict == "better"


def tiny_llava(folder: Path, seed: int) -> Path:
    """A random CLIP and a random Llama as one vision-language model."""
    from tiny_clip import TINY
    from tiny_llm import save_tiny_llm
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from llm2clip_plugin.cli import main as llm2clip

    CLIPVisionModel(
        CLIPVisionConfig(**TINY, image_size=28, patch_size=14)
    ).save_pretrained(folder / "tower")
    statistics = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "image_processor_type": "CLIPImageProcessor",
    }
    sizes = {"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 28}}
    (folder / "tower" / "preprocessor_config.json").write_text(
        json.dumps({**statistics, **sizes})
    )
    llm = save_tiny_llm(folder / "llm", "llama", seed=seed)
    words = [
        "--tower",
        str(folder / "tower"),
        "--llm",
        str(llm),
        "--output",
        str(folder / "llava"),
    ]
    assert llm2clip(["vlm", "build", *words]) == 0
    return folder / "llava"


def test_bench_mllm_runs_tasks_of_today(tmp_path, monkeypatch):
    """Two models on copies of two data sets, in their columns, without network; the logs are
    compared."""
    from datasets import Dataset, Image
    from PIL import Image as Picture

    from llava_integration.evaluator.benchmarks import bench
    from llava_integration.evaluator.compare.command import main as compare

    pictures = [tmp_path / f"{n}.png" for n in range(8)]
    for n, path in enumerate(pictures):
        Picture.new("RGB", (40, 30), (30 * n, 255 - 30 * n, 120)).save(path)
    same = {"image": [str(path) for path in pictures]}
    letters = [f"({'ab'[n % 2]})" for n in range(8)]
    mmvp = {
        "Index": range(1, 9),
        "Question": ["Is it?"] * 8,
        "Options": ["(a) yes (b) no"] * 8,
    }
    cv_bench = {
        "idx": range(8),
        "type": ["2D"] * 8,
        "task": ["Count"] * 8,
        "choices": [["1", "2"]] * 8,
    }
    cv_bench |= {
        "answer": [letter.upper() for letter in letters],
        "prompt": ["Which? (A) 1 (B) 2"] * 8,
    }
    sets = {
        "lmms-lab-eval/MMVP/train.parquet": {**same, **mmvp, "Correct Answer": letters},
        "nyu-visionx/CV-Bench/test.parquet": {
            **same,
            **cv_bench,
            "source": ["COCO"] * 8,
        },
    }
    for name, columns in sets.items():
        path = tmp_path / "hub" / name
        path.parent.mkdir(parents=True)
        Dataset.from_dict(
            {key: list(values) for key, values in columns.items()}
        ).cast_column("image", Image()).to_parquet(path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    options = [
        "--engine",
        "lmms-eval",
        "--device",
        "cpu",
        "--tasks",
        "mmvp",
        "cv_bench",
    ]
    for seed in (0, 1):
        model = tiny_llava(tmp_path / f"{seed}", seed)
        words = [
            str(tmp_path / "hub"),
            *options,
            "--model-path",
            str(model),
            "--output",
            str(tmp_path / f"run{seed}"),
        ]
        assert bench.main([*words, "--", "--gen_kwargs", "max_new_tokens=4"]) == 0
    folders = [tmp_path / f"run{seed}" / "lmms_eval" for seed in (0, 1)]
    assert compare([*map(str, folders), "--output", str(tmp_path / "report")]) == 0
    rows = json.loads((tmp_path / "report" / "compare.json").read_text())["rows"]
    questions = {row["benchmark"]: row["questions"] for row in rows}
    assert questions == {"mmvp mmvp_pair_accuracy": 4, "cv_bench cv_bench_acc": 8}
    assert not any("another way" in note for row in rows for note in row["notes"])
