"""Every number and every per-item value equals what the official scorers gave on the golden predictions."""

import dataclasses
import json

import pytest
from golden_mllm import BENCHMARKS, MODELS, ROOT, answers, expected

from llava_integration.benchmarks.answers import read_answers
from llava_integration.benchmarks.benchmark import Options
from llava_integration.benchmarks.rules import benchmark
from llava_integration.benchmarks.score import score_answers

# sums of the same floats in another order, or statistics.mean's exact rational: a few units in the last place
TOLERANCE = 1e-9
NOT_NUMBERS = {"stdout", "line", "split", "note", "missing_predictions", "samples_note"}


def score(name, model, **options):
    path = answers(name, model)
    return score_answers(name, ROOT / name, read_answers(path), Options(**options))


def numbers(tree, prefix=""):
    """All numbers of expected.json under the names that the metrics have; ``[value, count]`` pairs as two."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key in NOT_NUMBERS:
            continue
        if isinstance(value, dict):
            yield from numbers(value, f"{name}.")
        elif isinstance(value, list) and name.startswith("per_"):  # GQA: [percent, count]
            yield name, value[0]
            yield f"{prefix[:-1]}_count.{key}", value[1]
        elif isinstance(value, list):  # SEED-Bench: [correct, count]
            yield f"{name}.correct", value[0]
            yield f"{name}.count", value[1]
        else:
            yield name, value


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_number(name, model):
    record = score(name, model)
    checked = dict(numbers(expected(name)["models"][model]))
    assert len(checked) >= 2
    for key, value in checked.items():
        assert record.metrics[key] == pytest.approx(value, abs=TOLERANCE), key
    if "missing_predictions" in expected(name)["models"][model]:
        assert record.counts["missing"] == expected(name)["models"][model]["missing_predictions"]


ITEM_KEYS = {  # how an expected item finds ours
    "mme": lambda item: (item["category"], item["file"], item["nth"]),
    "textvqa": lambda item: item["line"],
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "mmbench"])
def test_every_item(name, model):
    record = score(name, model)
    key_of = ITEM_KEYS.get(name)
    ours = {(key_of or (lambda item: item["id"]))(item): item for item in record.items}
    theirs = expected(name)["per_item"][model]
    assert len(ours) == len(theirs) == len(record.items)
    for item in theirs:
        mine = ours[(key_of or (lambda item: item["question_id"]))(item)]
        for field, value in item.items():
            if field == "question_id" and name != "textvqa":
                assert mine["id"] == value and type(mine["id"]) is type(value)
            elif field == "text":
                assert mine["answer"] == value
            elif field == "answer":
                assert mine["truth"] == value
            elif isinstance(value, float):
                assert mine[field] == pytest.approx(value, abs=TOLERANCE), (field, item)
            else:
                assert mine[field] == value, (field, item)
        if "score_converted_percent" in item:
            assert 100 * mine["score"] == pytest.approx(item["score_converted_percent"], abs=TOLERANCE)


@pytest.mark.parametrize("model", MODELS)
def test_mmbench_groups_and_rows(model):
    record = score("mmbench", model)
    theirs = expected("mmbench")["per_item"][model]
    groups = {item["id"]: item for item in record.items}
    assert len(groups) == len(theirs["groups"])
    for group in theirs["groups"]:
        mine = groups[group["g_index"]]
        assert mine["score"] == group["hit_vlmevalkit"]
        assert mine["hit_lmms_static"] == group["hit_lmms_static"]
    rows = {row["index"]: row for item in record.items for row in item["rows"]}
    assert len(rows) == len(theirs["rows"])
    for row in theirs["rows"]:
        assert {key: rows[row["index"]][key] for key in row} == row


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", BENCHMARKS)
def test_headline_is_the_statistic_of_the_items(name, model):
    """What is resampled is what is printed."""
    record, chosen = score(name, model), benchmark(name)
    assert chosen.statistic(record.items).full() == pytest.approx(
        record.metrics[chosen.headline] * chosen.scale, abs=1e-9
    )


@pytest.mark.parametrize("run", ["model-a_shuffled", "model-a_missing3"])
def test_pope_is_joined_never_zipped(run):
    """The official numbers of a shuffled or short file are wrong; ours are not, and say what order would give."""
    quirk = expected("pope")["quirk_runs"][run]
    path = ROOT / "pope" / "quirk_answers" / f"{run}.jsonl"
    record = score_answers("pope", ROOT / "pope", read_answers(path), Options(corrected=True))
    official = dict(numbers(quirk["official_zip_by_order"]))
    for key, value in official.items():
        assert record.metrics[f"by_order.{key}"] == pytest.approx(value, abs=TOLERANCE), key
    assert any("joins by order" in note for note in record.notes)
    whole = score("pope", "model-a")
    by_id = {item["id"]: item["score"] for item in whole.items}
    assert all(by_id[item["id"]] == item["score"] for item in record.items if not item["missing"])
    if run == "model-a_shuffled":
        for category, accuracy in quirk["accuracy_if_joined_by_image_and_question"].items():
            assert record.metrics[f"categories.{category}.accuracy"] == pytest.approx(accuracy, abs=TOLERANCE)
    else:
        assert record.counts["missing"] == 3
        assert sum(record.metrics[f"categories.{c}.n"] for c in ("adversarial", "random", "popular")) == 301
        # corrected: an unanswered question is wrong, so n is whole
        assert sum(record.metrics[f"corrected_categories.{c}.n"] for c in ("adversarial", "random", "popular")) == 304


LOGS = {  # lmms-eval's task, and the metric of ours that is its aggregate
    "pope": ("pope", {name: f"lmms_eval.{name}" for name in
                      ("pope_accuracy", "pope_precision", "pope_recall", "pope_f1_score", "pope_yes_ratio")}),
    "mme": ("mme", {name: f"lmms_eval.{name}" for name in ("mme_perception_score", "mme_cognition_score")}),
    "gqa": ("gqa", {"exact_match": "lmms_eval.exact_match"}),
    "textvqa": ("textvqa_val", {"exact_match": "lmms_eval.exact_match"}),
    "scienceqa": ("scienceqa_img", {"exact_match": "lmms_eval.exact_match"}),
    "mmbench": ("mmbench_en_dev", {}),
    "vqav2": ("vqav2_val", {"exact_match": "lmms_eval.exact_match"}),
    "seedbench": ("seedbench", {name: f"lmms_eval.{name}" for name in ("seed_image", "seed_video", "seed_all")}),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", LOGS)
def test_lmms_eval_logs_give_the_same_as_llava_files(name, model):
    folder = ROOT / "lmms_eval" / f"synthetic__{model}"
    record = score_answers(name, ROOT / name, read_answers(folder, tasks=benchmark(name).lmms_eval_tasks), Options())
    llava = {item["id"]: item for item in score(name, model).items}
    task, aggregates = LOGS[name]
    for item in record.items:
        if not llava[item["id"]]["missing"]:
            assert item["score"] == llava[item["id"]]["score"], item
            assert item["answer"] == llava[item["id"]]["answer"]
        else:
            assert item["answer"] == ""
    assert record.counts["missing"] == record.counts["foreign"] == 0
    theirs = expected("lmms_eval")["aggregates"][task][model]
    for key, ours in aggregates.items():
        assert record.metrics[ours] == pytest.approx(theirs[key], abs=TOLERANCE)
    if name == "mmbench":
        assert 100 * record.metrics["lmms_eval_static.overall"] == pytest.approx(theirs["static_overall_acc_percent"])
    if not any(item["missing"] for item in llava.values()):
        chosen = benchmark(name)
        assert record.metrics[chosen.headline] == score(name, model).metrics[chosen.headline]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("gqa", "score_lmms_eval"),
        ("textvqa", "score_own_annotation"),
        ("scienceqa", "score_lmms_eval"),
        ("vqav2", "score_corrected"),
    ],
)
def test_lmms_eval_items_equal_their_own_log(name, model, ours):
    """The score that lmms-eval logged for each question is the one that our copy of its rule computes."""
    path = next((ROOT / "lmms_eval" / f"synthetic__{model}").glob(f"*_samples_{LOGS[name][0]}.jsonl"))
    logged = [json.loads(line)["exact_match"] for line in path.read_text(encoding="utf-8").splitlines()]
    record = score_answers(name, ROOT / name, read_answers(path), Options())
    assert len(logged) == len(record.items)
    for item, value in zip(record.items, logged, strict=True):
        assert item[ours] == pytest.approx(value, abs=TOLERANCE), item


@pytest.mark.parametrize("version", ["v0.3.0", "v0.5"])
@pytest.mark.parametrize("name", ["pope", "gqa"])
def test_older_lmms_eval_layouts(name, version):
    """The first 40 documents in an older layout give the same item scores; a part of a benchmark has to be allowed."""
    folder = ROOT / "lmms_eval_old" / version / "synthetic__model-b"
    read = read_answers(folder, tasks=benchmark(name).lmms_eval_tasks)
    with pytest.raises(ValueError, match="have no answer"):
        score_answers(name, ROOT / name, read, Options())
    record = score_answers(name, ROOT / name, read, Options(allow=1.0))
    llava = {item["id"]: item for item in score(name, "model-b").items}
    answered = [item for item in record.items if not item["missing"]]
    assert len(answered) == 40
    assert all(item["score"] == llava[item["id"]]["score"] for item in answered)


def test_log_of_v0_2_0_is_read(tmp_path):
    """v0.2.0 and older: one JSON with a list of logs, responses in nested lists, documents inside."""
    source = ROOT / "lmms_eval_old" / "v0.3.0" / "synthetic__model-b"
    rows = [json.loads(line) for line in next(source.glob("*gqa*")).read_text(encoding="utf-8").splitlines()]
    for row in rows:
        del row["input"]
    folder = tmp_path / "1014_1530_llava_model_args_abc123"
    folder.mkdir()
    (folder / "gqa.json").write_text(json.dumps({"args": {}, "model_configs": {}, "logs": rows, "time": "1"}))
    record = score_answers("gqa", ROOT / "gqa", read_answers(tmp_path, tasks=("gqa",)), Options(allow=1.0))
    llava = {item["id"]: item["score"] for item in score("gqa", "model-b").items}
    answered = [item for item in record.items if not item["missing"]]
    assert len(answered) == 40 and all(item["score"] == llava[item["id"]] for item in answered)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_corrected_rule_is_reported_next_to_the_official_one(name):
    plain, both = score(name, "model-a"), score(name, "model-a", corrected=True)
    extra = {key for key in both.metrics if key.startswith("corrected_")}
    assert extra and set(both.metrics) - extra == set(plain.metrics)
    assert all(plain.metrics[key] == both.metrics[key] for key in plain.metrics)


def test_scienceqa_corrected_keeps_missing_questions():
    record = score("scienceqa", "model-a", corrected=True)
    right = sum(item["score_corrected"] for item in record.items if item["has_image"])
    assert record.metrics["corrected_img_accuracy_percent"] == pytest.approx(100 * right / 92)  # of all with an image
    assert record.counts["doubled"] == 1 and record.counts["foreign"] == 1 and record.counts["missing"] == 7


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["vqav2", "vizwiz", "gqa", "seedbench", "mmbench"])
def test_submission_is_the_official_converters(name, model, tmp_path):
    output = tmp_path / "submission.json"
    benchmark(name).write_submission(ROOT / name, read_answers(answers(name, model)), output)
    official = {
        "vqav2": f"answers_upload/llava_vqav2_mscoco_val2014/{model}.json",
        "vizwiz": f"answers_upload/{model}.json",
        "gqa": f"data/{model}_testdev_balanced_predictions.json",
        "seedbench": f"answers_upload/{model}.jsonl",
        "mmbench": f"answers_upload/mmbench_dev_20230712/{model}.jsonl",
    }[name]
    ours, theirs = output.read_text(encoding="utf-8"), (ROOT / name / official).read_text(encoding="utf-8")
    if official.endswith(".jsonl"):
        assert [json.loads(line) for line in ours.splitlines()] == [json.loads(line) for line in theirs.splitlines()]
    else:
        assert json.loads(ours) == json.loads(theirs)


@pytest.mark.parametrize("name", ["vqav2", "vizwiz", "gqa", "seedbench"])
def test_submission_file_scores_as_the_answers_do(name, tmp_path):
    """A submission can be scored too, where its rule keeps what scoring needs."""
    output = tmp_path / "submission.json"
    read = read_answers(answers(name, "model-b"))
    benchmark(name).write_submission(ROOT / name, read, output)
    record = score_answers(name, ROOT / name, read_answers(output), Options())
    headline = benchmark(name).headline if name != "vizwiz" else "vqa_api.overall"
    assert record.metrics[headline] == pytest.approx(score(name, "model-b").metrics[headline], abs=TOLERANCE)


def test_score_file_survives_writing(tmp_path):
    record = score("mme", "model-a")
    again = type(record).read(record.write(tmp_path / "mme.scores.json"))
    assert dataclasses.asdict(again) == dataclasses.asdict(record)
