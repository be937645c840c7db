"""Logs that are damaged, unknown or of two forms: one line, or a note."""

import json

import pytest

from llava_integration.evaluator.compare.readers import read_logs
from llava_integration.evaluator.compare.sides import load_side
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.errors import ContractError

MALFORMED = {  # name of the file: (content, what the error names)
    "a.csv": ("item,score\n1,0.5\n2,good\n", "line 3"),
    "b.csv": ("item,score\n1\n", "line 2"),
    "c.csv": ("item,score\n,1\n", "line 2"),
    "d.csv": ("item,score\n1,nan\n", "line 2"),
    "e.csv": ("item,score\n1,\n", "line 2"),
    "f.csv": ("item,score\n1,1\n1,0\n", "item 1"),
    "g.csv": ("item,score\n", "no items"),
    "h.csv": ("name,value\n1,1\n", "h.csv"),
    "i.jsonl": ('{"item": 1, "score": 1}\n{"item": 2,', "line 2"),
    "j.jsonl": ('{"item": 1, "score": 1}\n[1]\n', "line 2"),
    "k.jsonl": ('{"item": 1, "score": [1]}\n', "line 1"),
    "l.jsonl": (
        '{"doc_id": 0, "doc_hash": "", "metrics": ["a"], "a": "x"}\n',
        "metrics a",
    ),
    "m.jsonl": (
        '{"doc_id": 0, "doc_hash": "", "metrics": ["a"], "a": 1}\n{"doc_id": 1}\n',
        "line 2",
    ),
    "n.jsonl": (
        '{"doc_id": 0, "doc_hash": "", "acc": 1}\n{"doc_id": 1, "acc": null}\n',
        "line 2",
    ),
    "o.jsonl": (
        '{"doc_id": 0, "doc_hash": "", "submission": {"a": 1}}\n',
        "submission of o",
    ),
    "p.jsonl": (
        '{"doc_id": 0, "doc_hash": "", "mme_perception_score": {"score": 1}}\n',
        "line 1.*category",
    ),
    "v.jsonl": (
        '{"doc_id": 0, "doc_hash": "", "coco_CIDEr": {"pred": "a"}}\n',
        "line 1",
    ),
    "w.jsonl": ('{"doc_id": 0, "doc_hash": "", "mmvp_pair_accuracy": 1}\n', "line 1"),
    "x.tsv": ("index\tprediction\teval_match\teval_score\n0\tA\t[1, \t1\n", "line 2"),
    "deep.json": ("[" * 100_000, "deep.json"),
    "deep_array.jsonl": ("[" * 100_000, r"deep_array\.jsonl"),
    "deep_object.jsonl": ('{"a":' * 100_000, r"deep_object\.jsonl"),
    "deeper.jsonl": (
        '{"doc_id": 0, "doc_hash": "", "a": 1}\n' + '{"a":' * 100_000,
        "line 2.*nested too deep",
    ),
    "z.csv": ("item,score\n1,1\n\udcff,1\n", "utf-8"),
    "y.jsonl": ('{"doc_id": 0, "doc_hash": "", "metrics": 1}\n', "y.jsonl"),
    "q.eval": ("not a zip file", r"q\.eval.*cut off"),
    "r.json": ('{"status": "error", "eval": {"run_id": "x", "task": "t"}}', "status"),
    "s.tsv": ("index\tprediction\thit\n0\tA\tmaybe\n", "line 2"),
    "u.tsv": ("index\tprediction\thit\n0\tA\n", "line 2"),
    "t_MME_result.xlsx": ("no workbook", "t_MME_result.xlsx"),
    "a_MME_result.xlsx": ("", "a_MME_result.xlsx is empty"),
    "aa.csv": ("", r"aa\.csv is empty"),
    "ab.csv": ("item;score\n1;1\n", r"ab\.csv has semicolons.*has commas"),
    "ac.tsv": ("item,score\n1,1\n", r"ac\.tsv has commas.*has tabs"),
    "ad.csv": ("\udcff\udcfei\0t\0e\0m\0,\0", r"ad\.csv is in UTF-16"),
    "ae.csv": (
        "Our model; seed 1\nitem,score\n1,1\n",
        r"ae\.csv, line 1 was taken for the header, but has one cell \(Our model; seed 1\), "
        r"expected the names of the columns, such as \(item, score\)",
    ),
    "af.tsv": ("Our model\t\t\nindex\tprediction\thit\n0\tA\t1\n", "line 1 was taken"),
    "samples_a_2026-11-28T21-57-04.1.jsonl": ("", "4.1.jsonl is empty"),
    "samples_b_2026-11-28T21-57-04.1.jsonl": ("\n", "it has no documents"),
    "20261129_061426_samples_a.jsonl": ("\n", "it has no documents"),
    "ae.json": ('{"args": {"log_samples": true}, "logs": []}', "it has no documents"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_logs_are_refused_in_one_line(tmp_path, name):
    content, named = MALFORMED[name]
    (tmp_path / name).write_text(content, errors="surrogateescape")
    with pytest.raises((ContractError, FileNotFoundError), match=named) as caught:
        load_side(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["samples_b_2026-11-28T21-57-04.1.jsonl", "20261129_061426_samples_b.jsonl"]
)
def test_a_log_that_was_cut_in_its_first_line_is_named(tmp_path, name):
    line = {"doc_id": 0, "doc_hash": "", "acc": 1} | (
        {"metrics": ["acc"]} if name.startswith("samples") else {}
    )
    (tmp_path / name.replace("_b", "_a")).write_text(json.dumps(line) + "\n")
    (tmp_path / name).write_text(json.dumps(line)[:10])
    (note,) = load_side(tmp_path).notes
    assert f"{name}, line 1" in note


def test_a_log_without_the_models_answers_is_read(tmp_path):
    """Answers are only shown: a log that was made small without them has all scores."""
    line = {"doc_id": 0, "doc_hash": "", "metrics": ["acc"], "acc": 1}
    emptied = line | {"arguments": {}, "resps": [], "filtered_resps": []}
    log = tmp_path / "samples_toy_2026-11-28T21-57-04.1.jsonl"
    log.write_text(json.dumps(emptied))
    (run,) = load_side(str(log)).runs["toy acc"]  # a path may be a text
    assert [item["score"] for item in run.items] == [1]


def test_a_log_that_nobody_understands_is_left_out_with_a_note(tmp_path):
    about = {"doc_id": 0, "doc_hash": ""}
    (tmp_path / "20261129_061426_samples_a.jsonl").write_text(
        json.dumps(about | {"acc": 1})
    )
    (tmp_path / "20261129_061426_samples_b.jsonl").write_text(
        json.dumps(about | {"corpus": {"pred": "x"}})
    )
    side = load_side(tmp_path)
    assert set(side.runs) == {"a acc"}
    assert "metrics corpus of b" in side.notes[0]


def test_a_folder_has_logs_of_one_form(tmp_path):
    (tmp_path / "a.csv").write_text("item,score\n1,1\n")
    (tmp_path / "b.jsonl").write_text('{"doc_id": 0, "doc_hash": "", "acc": 1}\n')
    with pytest.raises(ContractError, match=r"a\.csv"):
        read_logs(tmp_path)


def test_a_table_that_is_left_out_of_a_folder_is_a_note(tmp_path):
    (tmp_path / "a.csv").write_text("item,score\n1,1\n")
    (tmp_path / "b.csv").write_text("item;score\n1;1\n")
    (note,) = load_side(tmp_path).notes
    assert note.startswith(f"left out: {tmp_path / 'b.csv'} has semicolons")


def test_score_files_do_not_hide_other_logs_in_silence(tmp_path):
    """They are read alone, and a note for each other form says so."""
    items = [{"id": 1, "score": 1.0}]
    record = ScoreFile(benchmark="toy", metrics={}, items=items, model="m")
    record.write(tmp_path / "toy.scores.json")
    assert load_side(tmp_path).notes == ()
    (tmp_path / "a.csv").write_text("item,score\n1,1\n")
    line = {"doc_id": 0, "doc_hash": "", "metrics": ["acc"], "acc": 1}
    for name in "bc":
        log = tmp_path / f"samples_{name}_2026-11-28T21-57-04.1.jsonl"
        log.write_text(json.dumps(line))
    side = load_side(tmp_path)
    assert set(side.runs) == {"toy"}
    said = [note.partition("; first: ")[0] for note in side.notes]
    assert sorted(said) == [
        "left out: logs of the form lm-evaluation-harness (2",
        "left out: logs of the form table (1",
    ]


# n-samples of the results, and what is said of a printed number that is another
TRIMMED = {
    "cut": ({"original": 8, "effective": 8}, "of 8 documents, of which the log has 4"),
    "limit": ({"original": 8, "effective": 4}, "made of the scores in another way"),
    "unknown": (
        {},
        "made of the scores in another way, or of documents that the log lacks",
    ),
}


@pytest.mark.parametrize("case", TRIMMED)
def test_a_printed_number_of_more_documents(tmp_path, case):
    counts, why = TRIMMED[case]
    lines = []
    for number in range(4):
        about = {"doc_id": number, "doc_hash": "", "metrics": ["acc"]}
        lines.append(json.dumps({**about, "acc": number % 2}))
    date = "2026-11-28T21-57-04.1"
    log = tmp_path / f"samples_toy_{date}.jsonl"
    log.write_text("\n".join(lines))
    results = {"results": {"toy": {"acc,none": 0.25}}, "n-samples": {"toy": counts}}
    (tmp_path / f"results_{date}.json").write_text(json.dumps(results))
    (run,) = load_side(log).runs["toy acc"]
    assert f"its evaluator printed 0.25, {why}; here 0.5" in run.notes
