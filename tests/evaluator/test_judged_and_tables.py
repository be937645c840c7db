"""What the golden files leave out: LLaVA-Bench and MM-Vet with a judge's file."""

import json

import pytest

from llava_integration.evaluator.benchmarks.answers import read_answers
from llava_integration.evaluator.benchmarks.bench import score_answers
from llava_integration.evaluator.benchmarks.rules import benchmark


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        encoding="utf-8",
    )
    return path


@pytest.fixture
def llava_bench(tmp_path):
    """Four questions, the model's answers, and reviews of which the last failed."""
    folder = tmp_path / "llava-bench-in-the-wild"
    kinds = ["conv", "conv", "detail", "complex"]
    asked = [
        {
            "question_id": n,
            "image": f"00{n // 2}.jpg",
            "text": f"What is {n}?",
            "category": kinds[n],
        }
        for n in range(4)
    ]
    write_lines(folder / "questions.jsonl", asked)
    spoken = [
        {
            "question_id": n,
            "prompt": f"What is {n}?",
            "text": f"It is {n}.",
            "model_id": "m",
        }
        for n in range(4)
    ]
    said = write_lines(tmp_path / "answers.jsonl", spoken)
    marks = [[8.0, 4.0], [9.0, 7.0], [10.0, 10.0], [-1, -1]]
    reviews = write_lines(
        tmp_path / "reviews.jsonl",
        [
            {
                "id": n + 1,
                "question_id": n,
                "category": f"llava_bench_{kind}",
                "content": "8 4",
                "tuple": pair,
            }
            for n, (kind, pair) in enumerate(zip(kinds, marks, strict=True))
        ],
    )
    return folder, said, reviews


def test_llava_bench_as_summarize_gpt_review_prints_it(llava_bench):
    """Means over reviews, the failed one averaged in: reference 26/4 = 6.5, model 20/4 = 5,
    relative 76.9."""
    folder, said, reviews = llava_bench
    record = score_answers("llava_bench", folder, read_answers(said), reviews=reviews)
    assert record.metrics["all"] == 76.9
    assert (record.metrics["all.reference"], record.metrics["all.model"]) == (
        65.0,
        50.0,
    )
    assert record.metrics["llava_bench_conv"] == round(5.5 / 8.5 * 100, 1)
    assert record.counts["failed_reviews"] == 1
    assert record.items[1]["answer"] == "It is 1."
    assert benchmark("llava_bench").statistic(record.items).full() == pytest.approx(
        100 * 20 / 26
    )
    # the reviews as --answers
    alone = score_answers("llava_bench", folder, read_answers(reviews))
    assert alone.metrics["all"] == record.metrics["all"]


def test_mmvet_over_runs_and_capabilities(tmp_path):
    """Marks of two runs: totals 100 x (1 + .5 + 0)/3 and 100 x (.8 + .5 + .2)/3, both 50."""
    folder = tmp_path / "mm-vet"
    folder.mkdir()
    entries = {
        f"v1_{n}": {
            "imagename": f"v1_{n}.png",
            "question": f"q{n}",
            "answer": "a",
            "capability": caps,
        }
        for n, caps in enumerate([["rec"], ["rec", "ocr"], ["math"]])
    }
    (folder / "mm-vet.json").write_text(json.dumps(entries))
    grades = tmp_path / "grade.json"
    grades.write_text(
        json.dumps(
            {
                "v1_0": {"model": ["g"], "content": ["1"], "score": [1.0, 0.8]},
                "v1_1": {"model": ["g"], "content": ["1"], "score": [0.5, 0.5]},
                "v1_2": {"model": ["g"], "content": ["1"], "score": [0.0, 0.2]},
            }
        )
    )
    said = write_lines(
        tmp_path / "a.jsonl",
        [{"question_id": n, "prompt": f"q{n}", "text": f"t{n}"} for n in range(3)],
    )
    record = score_answers("mmvet", folder, read_answers(said), reviews=grades)
    assert record.metrics["total"] == pytest.approx(50.0)
    assert record.metrics["capability.rec"] == pytest.approx(100 * (0.9 + 0.5) / 2)
    assert record.metrics["capability.math"] == pytest.approx(10.0)
    assert (record.metrics["runs"], record.metrics["std_over_runs"]) == (
        2.0,
        pytest.approx(0.0, abs=1e-9),
    )
    assert [item["answer"] for item in record.items] == ["t0", "t1", "t2"]
