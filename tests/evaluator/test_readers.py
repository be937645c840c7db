"""Logs of other evaluators, written by the real packages (``logs/``), become the numbers that these
packages print."""

import gzip
import json
import math
import shutil

import numpy as np
import pytest
from golden_mllm import MODELS, ROOT, answers, expected
from reader_logs import LOGS, value

from llava_integration.evaluator.benchmarks import bench
from llava_integration.evaluator.benchmarks.answers import read_answers
from llava_integration.evaluator.benchmarks.bench import score_answers
from llava_integration.evaluator.compare.command import main
from llava_integration.evaluator.compare.comparison import build
from llava_integration.evaluator.compare.readers import Choices
from llava_integration.evaluator.compare.readers.cider import cider, tokens
from llava_integration.evaluator.compare.sides import load_side
from llava_integration.plug.checkpoints import sample_sha256
from llm2clip_plugin.atomic import write_text
from llm2clip_plugin.errors import ContractError


def test_lm_evaluation_harness():
    side = load_side(LOGS / "lm_eval")
    scores = [
        json.loads(line)["acc"]
        for line in next((LOGS / "lm_eval").glob("samples*")).open()
    ]
    assert value(side, "toy_mc acc") == pytest.approx(100 * sum(scores) / len(scores))
    (run,) = side.runs["toy_mc acc"]
    assert run.clusters[:4] == ["im0", "im0", "im1", "im1"]
    assert set(run.groups) == {"easy", "hard"}


def test_a_group_with_one_number_is_one_row():
    """17 of 40: the harness weights a group's tasks, here of 10 and 30 questions, by their size."""
    (run,) = load_side(LOGS / "lm_eval_group").runs["toys exact_match"]
    assert run.statistic.full() == pytest.approx(42.5)
    assert set(run.groups) == {"toy_a", "toy_b"}
    assert len(run.ids) == 40
    # question 0 of one task is not question 0 of the other
    assert len(set(run.clusters)) == 40


def test_of_several_filters_the_first_is_compared(tmp_path):
    lines = []
    for number in range(4):
        about = {"doc_id": number, "doc_hash": "a", "metrics": ["exact_match"]}
        lines.append({**about, "filter": "strict", "exact_match": number % 2})
        lines.append({**about, "filter": "flexible", "exact_match": 1})
    (tmp_path / "samples_toy_2026-11-28T21-57-04.1.jsonl").write_text(
        "\n".join(map(json.dumps, lines))
    )
    (run,) = load_side(tmp_path).runs["toy exact_match"]
    assert run.scores == [0, 1, 0, 1]
    assert "filter strict of strict, flexible" in run.notes


def test_both_images_of_an_mmvp_pair_must_be_right_and_there(tmp_path):
    lines = []
    for number, (pair, right) in enumerate(
        [(0, True), (0, True), (1, True), (1, False), (2, True)]
    ):
        value = {"pair_index": pair, "is_correct": right}
        lines.append({"doc_id": number, "doc_hash": "a", "mmvp_pair_accuracy": value})
    (tmp_path / "20250101_000000_samples_mmvp.jsonl").write_text(
        "\n".join(map(json.dumps, lines))
    )
    (run,) = load_side(tmp_path).runs["mmvp mmvp_pair_accuracy"]
    assert dict(zip(run.ids, run.scores, strict=True)) == {"0": 1, "1": 0}


def test_lmms_evals_composites():
    """MME: half of each subtask's questions right and no pair, twice; POPE: "yes" to 15 of which 5
    are."""
    yes = load_side(LOGS / "lmms_eval" / "yes")
    no = load_side(LOGS / "lmms_eval" / "no")
    assert value(yes, "mme") == value(no, "mme") == pytest.approx(100.0)
    assert value(yes, "pope") == pytest.approx(50.0)
    assert value(no, "pope") == 0


def test_parts_of_pope_and_splits_of_mmbench_are_not_runs_of_one_benchmark(tmp_path):
    """lmms-eval's pope_adv and pope_pop have the same document ids; nobody has the answers of
    mmbench_cn_test."""
    said = {"prediction": "yes", "ground_truth": "yes", "score": 1.0}
    asked = {
        "index": 0,
        "prediction": "A",
        "answer": "A",
        "category": "",
        "A": "x",
        "B": "y",
    }
    tasks = {
        "pope_adv": said,
        "pope_pop": said,
        "mmbench_cn_dev": asked,
        "mmbench_cn_test": asked | {"answer": "nan"},
    }
    for task, logged in tasks.items():
        line = {
            "doc_id": 0,
            "pope_f1_score" if logged is said else "submission": logged,
        }
        (tmp_path / f"20250101_000000_samples_{task}.jsonl").write_text(
            json.dumps(line)
        )
    side = load_side(tmp_path)
    assert {benchmark: value(side, benchmark) for benchmark in side.runs} == {
        "mmbench_cn": 100,
        "pope_adv F1": 100,
        "pope_pop F1": 100,
    }
    assert "mmbench_cn_test" in side.notes[0]


EXACT = ("gqa", "textvqa_val", "scienceqa_img", "vqav2_val")


# a golden log's task: (benchmark in a comparison, lmms-eval's metric, its unit in ours)
LMMS_EVAL = {
    **{task: (f"{task} exact_match", "exact_match", 100) for task in EXACT},
    "seedbench": ("seedbench seed_all", "seed_all", 100),
    "pope": ("pope", "pope_f1_score", 100),
    "mme": ("mme", "mme_perception_score", 1),
}


@pytest.mark.parametrize("model", MODELS)
def test_lmms_evals_numbers(model):
    """Every log gives what lmms-eval's own aggregation gave; MMBench's, which needs a judge, what
    `score` gives."""
    side = load_side(ROOT / "lmms_eval" / f"synthetic__{model}")
    aggregates = expected("lmms_eval")["aggregates"]
    for task, (benchmark, metric, unit) in LMMS_EVAL.items():
        assert value(side, benchmark) == pytest.approx(
            unit * aggregates[task][model][metric]
        ), task
        rest = side.runs["MME cognition"][0].ids if task == "mme" else []
        assert len(side.runs[benchmark][0].ids + rest) == aggregates[task][model]["n"]
    assert value(side, "MME cognition") == pytest.approx(
        aggregates["mme"][model]["mme_cognition_score"]
    )
    compared = {
        name
        for name, (run,) in side.runs.items()
        if "names no images" in "\n".join(run.notes)
    }
    exact = {f"{task} exact_match" for task in ("gqa", "scienceqa_img", "vqav2_val")}
    assert compared == {*exact, "seedbench seed_all", "pope"}
    (run,) = side.runs["mmbench"]
    record = score_answers(
        "mmbench", ROOT / "mmbench", read_answers(answers("mmbench", model))
    )
    assert dict(zip(run.ids, run.scores, strict=True)) == {
        str(item["id"]): item["score"] for item in record.items
    }


@pytest.mark.parametrize("version", ["v0.3.0", "v0.5"])
def test_older_lmms_evals(version):
    """Their first 40 documents have the scores of today's log."""
    old = load_side(ROOT / "lmms_eval_old" / version / "synthetic__model-b")
    new = load_side(ROOT / "lmms_eval" / "synthetic__model-b")
    for benchmark in ("gqa exact_match", "pope"):
        assert old.runs[benchmark][0].scores == new.runs[benchmark][0].scores[:40]


def test_bench_mllm_does_not_run_a_task_again(tmp_path):
    """A log that is there is read as `compare` reads it."""
    model = tmp_path / "llava"
    folder = tmp_path / "lmms_eval" / "gqa"
    record = tmp_path / "logs" / "gqa.model"
    options = [
        "--model-path",
        str(model),
        "--output",
        str(tmp_path),
        "--engine",
        "lmms-eval",
        "--tasks",
        "gqa",
    ]
    (log,) = (ROOT / "lmms_eval" / "synthetic__model-b").glob("*_gqa.jsonl")
    folder.mkdir(parents=True)
    (folder / log.name).write_bytes(log.read_bytes())
    outcome = bench.run_lmms_eval("gqa", bench.COMMAND.parse(options))
    assert outcome.status == "scored", outcome.detail
    assert outcome.value == pytest.approx(76.875), outcome.detail
    write_text(model / "model.safetensors", "weights")
    write_text(record, f"{model} {sample_sha256(model)}")
    write_text(model / "model.safetensors", "of another training in this folder")
    with pytest.raises(ContractError, match="--overwrite"):
        bench.run_lmms_eval("gqa", bench.COMMAND.parse(options))
    with pytest.raises(ValueError, match="llm2clip compare"):
        read_answers(log)


def test_bench_mllm_takes_no_logs_of_other_options(tmp_path, monkeypatch):
    """Such as those of a first try with --limit."""
    options = ["--model-path", "org/llava", "--output", str(tmp_path)]
    options += ["--engine", "lmms-eval", "--tasks", "gqa"]
    (log,) = (ROOT / "lmms_eval" / "synthetic__model-b").glob("*_gqa.jsonl")

    def answer(words, *_):
        folder = tmp_path / "lmms_eval" / "gqa"
        folder.mkdir(parents=True)
        lines = log.read_text().splitlines(keepends=True)
        if "--limit" in words:
            lines = lines[:8]
        (folder / log.name).write_text("".join(lines))

    monkeypatch.setattr(bench, "run_logged", answer)
    for _ in range(2):
        limited = bench.COMMAND.parse([*options, "--", "--limit", "8"])
        assert bench.run_lmms_eval("gqa", limited).value == pytest.approx(87.5)
    whole = bench.COMMAND.parse(options)
    with pytest.raises(ContractError, match=r"vicuna_v1 --limit 8, not of --conv-mode"):
        bench.run_lmms_eval("gqa", whole)
    whole = bench.COMMAND.parse([*options, "--overwrite"])
    assert bench.run_lmms_eval("gqa", whole).value == pytest.approx(76.875)


def test_bench_mllms_engines_have_options_of_their_own(tmp_path):
    refused = {"--tasks mmvp": "lmms-eval's", "": "needs DATA"}
    for option in (
        "--benchmarks gqa",
        "--data nosuch",
        "--model-base org/base",
        "--model-path ./llava-nosuch",
    ):
        refused[f"--engine lmms-eval {option}"] = option.split()[
            option.endswith("nosuch")
        ]
    for options, named in refused.items():
        with pytest.raises((ValueError, FileNotFoundError), match=named):
            bench.main(
                [
                    "--model-path",
                    "org/llava",
                    "--output",
                    str(tmp_path),
                    *options.split(),
                ]
            )


@pytest.mark.parametrize(
    ("config", "model"),
    [
        ({"model_type": "llava"}, "llava_hf"),
        ({"model_type": "llava", "mm_vision_tower": "x"}, "llava"),
        ({}, "llava"),
    ],
)
def test_the_model_of_lmms_eval_is_that_of_the_checkpoint(tmp_path, config, model):
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = [
        "--engine",
        "lmms-eval",
        "--model-path",
        str(tmp_path),
        "--output",
        "out",
        "--device",
        "cpu",
    ]
    words = bench.lmms_eval_command("mmvp", bench.COMMAND.parse(options))
    assert words[words.index("--model") + 1] == model
    assert f"pretrained={tmp_path}" in words[words.index("mmvp") - 2]


def test_lmms_evals_own_metric(tmp_path):
    about = {"doc_hash": "a", "target": "x"}
    wer = {"wer": 0.5}
    lines = [
        {
            "doc_id": n,
            **about,
            "input_media": [f"{n // 2}.jpg"],
            "exact_match": n % 2,
            **wer,
        }
        for n in range(4)
    ]
    (tmp_path / "20261129_061426_samples_gqa.jsonl").write_text(
        "\n".join(map(json.dumps, lines))
    )
    (run,) = load_side(tmp_path).runs["gqa exact_match"]
    assert run.scores == [0, 1, 0, 1]
    assert run.clusters == ["0.jpg", "0.jpg", "1.jpg", "1.jpg"]
    results = {"higher_is_better": {"gqa": {"wer": False}}, "model_name": "m"}
    (tmp_path / "20261129_061426_results.json").write_text(json.dumps(results))
    (run,) = load_side(tmp_path).runs["gqa wer"]
    assert run.scores == [-0.5] * 4
    assert "lower is better" in run.notes[0]


@pytest.mark.parametrize("ending", ["eval", "json"])
def test_inspect_ai(ending):
    """The mean over epochs of a sample; the package printed the accuracy of all."""
    side = load_side(next((LOGS / "inspect_ai").glob(f"*.{ending}")))
    (run,) = side.runs["toy_match match"]
    assert value(side, "toy_match match") == pytest.approx(100 / 6)
    assert len(run.ids) == 6
    assert run.clusters[0] == "im0"


def test_a_sample_of_inspect_ai_is_the_mean_over_its_epochs(tmp_path):
    samples = []
    for number, values in enumerate([("C", "I"), ("C", "C"), ("I", "P")]):
        for epoch, grade in enumerate(values, 1):
            scores = {"match": {"value": grade}}
            samples.append(
                {"id": number, "epoch": epoch, "target": "x", "scores": scores}
            )
    results = {"scores": [{"name": "match", "scorer": "match"}]}
    log = {
        "version": 2,
        "status": "success",
        "eval": {"run_id": "x", "task": "toy"},
        "results": results,
    }
    (tmp_path / "log.json").write_text(json.dumps({**log, "samples": samples}))
    (run,) = load_side(tmp_path).runs["toy match"]
    assert dict(zip(run.ids, run.scores, strict=True)) == {
        "0": 0.5,
        "1": 1.0,
        "2": 0.25,
    }


MEANS = {  # lmms-eval's task: its metric
    "cv_bench": "cv_bench_acc",
    "mmvp": "mmvp_pair_accuracy",
    "blink": "blink_acc",
    "realworldqa": "exact_match",
    "mmstar": "average",
    "chartqa": "relaxed_overall",
    "docvqa_val": "anls",
    "mmmu_val": "mmmu_acc",
    "coco2017_cap_val": "coco_CIDEr",
}


TODAY = {  # benchmark: (lmms-eval's task, its metric, filter; its unit in ours)
    **{
        f"{task} {metric}": (task, f"{metric},none", 100)
        for task, metric in MEANS.items()
    },
    "ai2d exact_match": ("ai2d", "exact_match,flexible-extract", 100),
    "mme": ("mme", "mme_perception_score,none", 1),
    "MME cognition": ("mme", "mme_cognition_score,none", 1),
    "pope": ("pope", "pope_f1_score,none", 100),
    "mmbench": ("mmbench_en_dev_static", "gpt_eval_score,none", 1),
}


def test_lmms_evals_tasks_of_today():
    """Every task's number is that which lmms-eval printed, of answers of which a third are
    wrong."""
    folder = LOGS / "lmms_eval" / "today"
    side = load_side(folder)
    printed = json.loads(next(folder.glob("*_results.json")).read_text())["results"]
    assert set(side.runs) == set(TODAY)
    for benchmark, (task, metric, unit) in TODAY.items():
        # MMMU's is .66667
        assert (
            0
            < value(side, benchmark)
            == pytest.approx(unit * printed[task][metric], abs=2e-3)
        ), benchmark
    assert not [
        note
        for (run,) in side.runs.values()
        for note in run.notes
        if "another way" in note
    ]
    assert len(set(side.runs["blink blink_acc"][0].groups)) == 14
    (of_cider,) = side.runs["coco2017_cap_val coco_CIDEr"]
    assert any(note.endswith("and stay fixed") for note in of_cider.notes)


def test_another_aggregate_than_the_evaluators_is_said(tmp_path):
    """A task that weighs its parts otherwise: the number that was printed is in a note."""
    for log in (LOGS / "lmms_eval" / "today").glob("*mmvp*"):
        (tmp_path / log.name.replace("mmvp", "other")).write_text(
            log.read_text().replace("mmvp_pair_acc", "mmvp_acc")
        )
    name = next(tmp_path.iterdir()).name[:15]
    results = {"results": {"other": {"mmvp_accuracy,none": 0.25}}}
    (tmp_path / f"{name}_results.json").write_text(json.dumps(results))
    (run,) = load_side(tmp_path).runs["other mmvp_accuracy"]
    assert any("printed 0.25" in note for note in run.notes)


CAPTIONS = {  # as Stanford's PTBTokenizer and pycocoevalcap make of it
    "A man's dog can't sit on the well-lit t-shirt.": (
        "a man 's dog ca n't sit on the well-lit t-shirt"
    ),
    'It is 3.5 meters (or so) high; "no" & yes!': (
        "it is 3.5 meters -lrb- or so -rrb- high no & yes"
    ),
    "He's there, I'm gone, we've won, she'll go": "he 's there i 'm gone we 've won she 'll go",
    "Mr. Smith, a.m. and the U.S. flag, no. 42": "mr. smith a.m. and the u.s. flag no. 42",
    "A bottle of H&M, red/white, park!!": "a bottle of h&m red/white park !!",
    "The girls' team; James's hat": "the girls team james 's hat",
    "I cannot believe 1/2 of 12,000 at 10:30": "i can not believe 1/2 of 12,000 at 10:30",
}


@pytest.mark.parametrize("caption", CAPTIONS)
def test_captions_are_tokenized_as_the_treebank(caption):
    assert " ".join(tokens(caption)) == CAPTIONS[caption]


def test_cider_by_hand():
    """Two captions, one word in each: idf is log 2; equal ones score 10 of four n-gram lengths a
    quarter, others 0."""
    assert cider(["cat", "dog"], [["cat"], ["bird"]]) == [pytest.approx(2.5), 0]


def inspect_log(path, grades, *, accuracy, samples):
    """A log of inspect_ai with these grades, that printed this accuracy of so many samples."""
    scores = [
        {"id": n, "epoch": 1, "target": "x", "scores": {"match": {"value": grade}}}
        for n, grade in enumerate(grades)
    ]
    metrics = {"accuracy": {"name": "accuracy", "value": accuracy}}
    log = {
        "version": 2,
        "status": "success",
        "eval": {"run_id": "x", "task": "toy", "dataset": {"samples": samples}},
        "results": {
            "scores": [{"name": "match", "scorer": "match", "metrics": metrics}]
        },
        "samples": scores,
    }
    path.write_text(json.dumps(log))
    (run,) = load_side(path).runs["toy match"]
    return run.notes


def test_the_number_that_inspect_ai_printed_is_compared(tmp_path):
    path = tmp_path / "log.json"
    assert inspect_log(path, "CCIC", accuracy=0.75, samples=4) == []
    part, other = inspect_log(path, "CCIC", accuracy=0.381, samples=100)
    assert "4 of the task's 100 samples" in part
    assert "printed 0.381" in other
    assert "here 0.75" in other


def harness_log(folder, printed, documents):
    """A log of the harness of 10 documents, half of them right."""
    folder.mkdir()
    date = "2026-11-28T21-57-04.1"
    lines = [
        {"doc_id": n, "doc_hash": "a", "metrics": ["acc"], "acc": n % 2}
        for n in range(10)
    ]
    (folder / f"samples_toy_{date}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    results = {
        "results": {"toy": {"acc,none": printed}},
        "n-samples": {"toy": {"original": documents, "effective": 10}},
    }
    (folder / f"results_{date}.json").write_text(json.dumps(results))
    (run,) = load_side(folder).runs["toy acc"]
    return run.notes


def test_a_number_printed_in_percent_is_the_same_number(tmp_path):
    assert harness_log(tmp_path / "share", 0.5, 10) == []
    assert harness_log(tmp_path / "percent", 50.0, 10) == []
    (note,) = harness_log(tmp_path / "other", 40.0, 10)
    assert "printed 40" in note


def test_a_part_of_a_tasks_documents_is_said(tmp_path):
    (note,) = harness_log(tmp_path / "part", 0.5, 5000)
    assert "10 of the task's 5,000 documents" in note


def test_the_harness_up_to_0_4_2_wrote_arrays(tmp_path):
    """MODEL_ARGUMENTS_TASK.jsonl next to results.json; no hashes, no names of metrics."""
    documents = []
    for n in range(8):
        arguments = [[f"Which? {n}", " yes"], [f"Which? {n}", " no"]]
        document = {"doc_id": n, "doc": {"question": f"Which? {n}"}, "target": "0"}
        document |= {
            "arguments": arguments,
            "resps": [[-1, True]],
            "filtered_resps": [[-1, True]],
        }
        documents.append(document | {"acc": n % 2, "acc_norm": 1})
    for task in ("arc", "arc_easy"):
        log = tmp_path / f"pretrained__org__llm_{task}.jsonl"
        log.write_text(json.dumps(documents, indent=2))
    results = {"arc": {"acc,none": 0.5}, "arc_easy": {"acc,none": 0.625}}
    (tmp_path / "results.json").write_text(json.dumps({"results": results}))
    side = load_side(tmp_path)
    assert {name: value(side, name) for name in side.runs} == {
        "arc acc": 50,
        "arc_easy acc": 50,
    }
    assert side.runs["arc acc"][0].notes == []
    (note,) = side.runs["arc_easy acc"][0].notes
    assert "printed 0.625" in note
    assert side.runs["arc acc"][0].items[3]["question"] == "Which? 3"
    log = tmp_path / "pretrained__org__llm_arc.jsonl"
    log.write_text(json.dumps(documents[:4])[:-100])
    assert "pretrained__org__llm_arc.jsonl" in load_side(tmp_path).notes[0]


@pytest.mark.parametrize("folder", ["lm_eval", "lmms_eval/yes"])
def test_packed_logs_are_read(tmp_path, folder):
    for path in (LOGS / folder).iterdir():
        if path.suffix == ".jsonl":
            packed = gzip.compress(path.read_bytes())
            (tmp_path / f"{path.name}.gz").write_bytes(packed)
        else:
            shutil.copy(path, tmp_path)
    plain = load_side(LOGS / folder)
    side = load_side(tmp_path)
    assert set(side.runs) == set(plain.runs)
    for name in side.runs:
        assert value(side, name) == value(plain, name)


def perplexity_side(folder, printed, *, better, seed):
    """A log of the harness on 60 texts, whose log-likelihood is better by this much a word."""
    rng = np.random.default_rng(0)
    words = rng.integers(20, 200, size=60)
    likelihoods = words * (rng.normal(-2.5, 0.3, size=60) + better)
    likelihoods += np.random.default_rng(seed).normal(0, 1, size=60)
    lines = []
    for n, (likelihood, length) in enumerate(zip(likelihoods, words, strict=True)):
        about = {
            "doc_id": n,
            "doc_hash": "h",
            "metrics": ["word_perplexity", "bits_per_byte"],
        }
        pair = [likelihood, int(length)]
        lines.append({**about, "word_perplexity": pair, "bits_per_byte": pair})
    folder.mkdir()
    date = "2026-11-28T21-57-04.1"
    (folder / f"samples_wikitext_{date}.jsonl").write_text(
        "\n".join(map(json.dumps, lines))
    )
    results = {"wikitext": {"word_perplexity,none": printed}}
    (folder / f"results_{date}.json").write_text(json.dumps({"results": results}))
    return math.exp(-likelihoods.sum() / words.sum())


def test_a_lower_perplexity_is_better(tmp_path):
    """Over all words, not the mean over texts; the number is the one that the harness prints."""
    base = perplexity_side(tmp_path / "base", 0.0, better=0.0, seed=1)
    new = perplexity_side(tmp_path / "new", 0.0, better=0.1, seed=2)
    assert new < base
    sides = [load_side(tmp_path / name) for name in ("base", "new")]
    comparison = build(sides)
    (row,) = comparison.rows
    assert (row.result.base, row.result.new) == pytest.approx((-base, -new))
    assert row.verdict == "better"
    assert comparison.warnings == ()
    perplexity_side(tmp_path / "printed", base, better=0.0, seed=1)
    (run,) = load_side(tmp_path / "printed").runs["wikitext word_perplexity"]
    assert run.notes == [
        "word_perplexity: lower is better, so its negative is compared"
    ]
    bits = load_side(tmp_path / "base", choices=Choices(metric="bits_per_byte"))
    assert value(bits, "wikitext bits_per_byte") == pytest.approx(-math.log2(base))


def test_lambadas_perplexity_is_of_a_likelihood(tmp_path):
    """A line has the log-likelihood alone, of which more is better."""
    lines = []
    for n in range(10):
        about = {"doc_id": n, "doc_hash": "h", "metrics": ["perplexity", "acc"]}
        lines.append({**about, "perplexity": -1.0 - n / 10, "acc": 1})
    log = tmp_path / "samples_lambada_2026-11-28T21-57-04.1.jsonl"
    log.write_text("\n".join(map(json.dumps, lines)))
    assert value(load_side(log), "lambada perplexity") == pytest.approx(-math.exp(1.45))


def test_a_table_has_tasks_and_runs(tmp_path):
    table = tmp_path / "scores.csv"
    lines = [
        f"{task},{run},{n},{n // 2},{(n + run) % 2}"
        for task in "xy"
        for run in (0, 1)
        for n in range(6)
    ]
    table.write_text("\n".join(["task,seed,item,group,score", *lines]))
    side = load_side(table)
    assert {name: len(runs) for name, runs in side.runs.items()} == {"x": 2, "y": 2}
    assert side.runs["x"][0].clusters == ["0", "0", "1", "1", "2", "2"]


def test_two_forms_are_compared_by_item(tmp_path, capsys):
    """A planted difference of a quarter is found between a table and a log of the harness."""
    table = tmp_path / "a.csv"
    log = tmp_path / "samples_a_2026-11-28T21-57-04.1.jsonl"
    about = {"doc_hash": "h", "metrics": ["acc"]}
    log.write_text(
        "\n".join(
            json.dumps({"doc_id": n, **about, "acc": float(n % 4 != 3)})
            for n in range(400)
        )
    )
    table.write_text(
        "item,score,task\n"
        + "".join(f"{n},{int(n % 2 == 0)},a acc\n" for n in range(400))
    )
    main([str(table), str(log)])
    assert "+25.0" in capsys.readouterr().out
