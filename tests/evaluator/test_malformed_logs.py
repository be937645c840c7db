"""Logs that are damaged, unknown or of two forms: one line, or a note."""

import json

import pytest

from llava_integration.evaluator.compare.readers import read_logs
from llava_integration.evaluator.compare.sides import load_side
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
    "z.csv": ("item,score\n1,1\n\udcff,1\n", "utf-8"),
    "y.jsonl": ('{"doc_id": 0, "doc_hash": "", "metrics": 1}\n', "y.jsonl"),
    "q.eval": ("not a zip file", r"q\.eval.*cut off"),
    "r.json": ('{"status": "error", "eval": {"run_id": "x", "task": "t"}}', "status"),
    "s.tsv": ("index\tprediction\thit\n0\tA\tmaybe\n", "line 2"),
    "u.tsv": ("index\tprediction\thit\n0\tA\n", "line 2"),
    "t_MME_result.xlsx": ("no workbook", "t_MME_result.xlsx"),
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
