"""`compare --drift`: each planted cause is named, question by question."""

import json
from pathlib import Path

import pytest

from llava_integration.evaluator.compare.command import COMMAND, main
from llava_integration.evaluator.compare.drift import (
    ANSWER,
    ANSWER_ALONE,
    ANSWER_OF_QUESTION,
    EXTRACTION,
    MISSING,
    PROMPT,
    SCORING,
    TRUTH,
    UNKNOWN,
    drift,
)
from llava_integration.evaluator.compare.readers import readers
from llava_integration.evaluator.compare.sides import load_side
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.errors import ContractError


def items_of(count=20):
    """Questions of which every second is right."""
    items = []
    for number in range(count):
        items.append(
            {
                "id": number,
                "score": float(number % 2),
                "question": f"What is in {number}?",
                "answer": f"answer {number}",
                "truth": f"truth {number}",
                "response_hash": f"text {number}",
            }
        )
    return items


def side(folder, name, items, **provenance):
    record = ScoreFile(
        benchmark="toy", metrics={}, items=items, model="m", provenance=provenance
    )
    return load_side(record.write(folder / f"{name}.scores.json"), name)


def drift_with(folder, *changes, dropped=()):
    """The drift of runs of which the second has these changes: (id, fields) each."""
    items = items_of()
    for identifier, fields in changes:
        items[identifier] |= fields
    items = [item for item in items if item["id"] not in dropped]
    ((result,), _) = drift(side(folder, "old", items_of()), side(folder, "new", items))
    return result


OTHER_ANSWER = {"answer": "other", "response_hash": "other text"}
PLANTED = {
    PROMPT: {"question": "What is shown?", **OTHER_ANSWER},
    TRUTH: {"truth": "other"},
    ANSWER_OF_QUESTION: OTHER_ANSWER,
    ANSWER_ALONE: {"question": "", **OTHER_ANSWER},
    EXTRACTION: {"answer": "other"},
    SCORING: {},
}


@pytest.mark.parametrize("cause", PLANTED)
def test_a_planted_cause_is_named(tmp_path, cause):
    """Question 1 was right, and is wrong now."""
    result = drift_with(tmp_path, (1, {"score": 0.0, **PLANTED[cause]}))
    (change,) = result.changes
    assert (change.cause, change.ids) == (cause, ("1",))
    assert (change.better, change.worse) == (0, 1)
    assert change.points == pytest.approx(-100 / 20)
    assert (result.base, result.new) == pytest.approx((50, 45))


def test_all_causes_at_a_time_add_up(tmp_path):
    """Each question has its own; what they add is the whole difference."""
    changes = []
    for number, fields in enumerate(PLANTED.values()):
        changes.append((2 * number, {"score": 1.0, **fields}))
    result = drift_with(tmp_path, *changes)
    assert [change.cause for change in result.changes] == list(PLANTED)
    assert result.differing == len(PLANTED)
    explained = sum(change.points for change in result.changes)
    assert explained == pytest.approx(result.new - result.base)


def test_an_answer_that_is_the_same_is_not_the_prompts_fault(tmp_path):
    result = drift_with(tmp_path, (1, {"score": 0.0, "question": "Another?"}))
    assert [change.cause for change in result.changes] == [SCORING]


def test_what_changed_without_effect_is_counted(tmp_path):
    result = drift_with(
        tmp_path, (1, {"question": "Another?"}), (2, {"answer": "other"}), (3, {})
    )
    assert result.changes == ()
    assert result.same_score == (1, 1)


def test_questions_that_one_log_has(tmp_path):
    """Two right ones are gone: what that moves is a cause of its own."""
    result = drift_with(tmp_path, (0, {"score": 1.0, **OTHER_ANSWER}), dropped=(1, 3))
    assert result.only == (2, 0)
    assert [change.cause for change in result.changes] == [ANSWER_OF_QUESTION, MISSING]
    explained = sum(change.points for change in result.changes)
    assert explained == pytest.approx(result.new - result.base)


def test_questions_that_are_numbered_otherwise(tmp_path):
    items = items_of()
    moved = []
    for number, item in enumerate(items):
        moved.append({**items[(number + 1) % 20], "id": item["id"]})
    ((result,), _) = drift(side(tmp_path, "old", items), side(tmp_path, "new", moved))
    assert result.renumbered == 20
    assert [change.cause for change in result.changes] == [PROMPT]


def test_a_table_without_answers_is_unknown(tmp_path, capsys):
    for name, score in (("old", 1), ("new", 0)):
        (tmp_path / f"{name}.csv").write_text(f"item,score\na,1\nb,{score}\n")
    assert main([str(tmp_path / "old.csv"), str(tmp_path / "new.csv"), "--drift"]) == 0
    shown = capsys.readouterr().out
    assert UNKNOWN in shown
    assert "2 questions are in both logs; 1 have another score" in shown


def test_the_command_says_it_in_words(tmp_path, capsys):
    """Settings that differ, a lost score for each reason; several runs are refused."""
    items = items_of()
    side(
        tmp_path, "old", items, answer_settings={"temperature": 0.0, "dtype": "float16"}
    )
    changed = items_of()
    changed[1] |= {"score": 0.0, **OTHER_ANSWER}
    changed[3] |= {"score": 0.0}
    side(
        tmp_path,
        "new",
        changed,
        answer_settings={"temperature": 0.2, "dtype": "float16"},
    )
    files = [str(tmp_path / f"{name}.scores.json") for name in ("old", "new")]
    out = tmp_path / "out"
    assert (
        main([*files, "--names", "old*", "new", "--drift", "--output", str(out)]) == 0
    )
    shown = capsys.readouterr().out
    assert "# What changed from old\\* to new?" in shown
    assert "toy: 50.00 -> 40.00 (-10.00)" in shown
    assert "20 questions are in both logs; 2 have another score." in shown
    assert ANSWER_OF_QUESTION in shown
    assert SCORING in shown
    assert "answer_settings.temperature: 0.0 -> 0.2" in shown
    assert "dtype" not in shown
    (record,) = json.loads((out / "drift.json").read_text())["benchmarks"]
    assert [change["ids"] for change in record["changes"]] == [["1"], ["3"]]
    assert (out / "drift.md").read_text() in shown
    side(tmp_path / "runs", "one", items)
    side(tmp_path / "runs", "two", changed)
    with pytest.raises(ContractError, match="has 2 runs of toy"):
        main([files[0], str(tmp_path / "runs"), "--drift"])
    with pytest.raises(ValueError, match="--drift takes two sides"):
        main([*files, files[0], "--drift"])


def change_first(folder, name, change):
    """A copy of a log of the harness, with its first line changed."""
    lines = [json.loads(line) for line in LOG.read_text().splitlines()]
    change(lines[0])
    path = folder / name / LOG.name
    path.parent.mkdir()
    path.write_text("\n".join(map(json.dumps, lines)))
    return load_side(path, name)


def other_prompt(line):
    line["arguments"]["gen_args_0"]["arg_0"] = "What is 0 minus 0?"
    more_likely(line)


def more_likely(line):
    """The last option is the most likely now."""
    line["resps"][-1] = [["0.0", "False"]]
    line["filtered_resps"][-1] = ["0.0", "False"]


LOG = next((Path(__file__).parent / "logs" / "lm_eval").glob("samples_*.jsonl"))
IN_A_LOG = {
    PROMPT: other_prompt,
    ANSWER: more_likely,
    TRUTH: lambda line: line.update(target="2"),
    EXTRACTION: lambda line: line["filtered_resps"].reverse(),
    SCORING: lambda line: None,
}


@pytest.mark.parametrize("cause", IN_A_LOG)
def test_causes_in_logs_of_the_harness(tmp_path, cause):
    """Its items hold hashes of the prompt and of all that the model said."""

    def change(line):
        IN_A_LOG[cause](line)
        line["acc"] = 1 - line["acc"]

    old = change_first(tmp_path, "old", lambda line: None)
    new = change_first(tmp_path, "new", change)
    ((result,), _) = drift(old, new)
    assert [(one.cause, len(one.ids)) for one in result.changes] == [(cause, 1)]


def test_of_long_answers_the_beginning_says_nothing(tmp_path):
    """Both logs keep 600 characters of an answer; where there is a hash, it decides."""
    cases = (((), UNKNOWN), (("a", "b"), ANSWER_OF_QUESTION), (("a", "a"), SCORING))
    for hashes, cause in cases:
        sides = []
        for number, name in enumerate(("old", "new")):
            item = {
                "id": 1,
                "score": float(number),
                "answer": "x" * 600,
                "question": "?",
            }
            if hashes:
                item["response_hash"] = hashes[number]
            sides.append(side(tmp_path, name, [item]))
        ((result,), _) = drift(*sides)
        assert [change.cause for change in result.changes] == [cause]


def test_unknown_where_no_answer_is_known(tmp_path):
    sides = []
    for name, score in (("old", 1.0), ("new", 0.0)):
        sides.append(side(tmp_path, name, [{"id": 1, "score": score}]))
    ((result,), _) = drift(*sides)
    assert [change.cause for change in result.changes] == [UNKNOWN]


def folder_of(folder, tasks, model="m"):
    """A side's folder of score files; a task without items is a damaged file, two runs of one are
    two files."""
    for place, (task, items) in enumerate(tasks):
        path = folder / f"{place}.scores.json"
        record = ScoreFile(benchmark=task, metrics={}, items=items, model=model)
        record.write(path)
        if not items:
            path.write_text(path.read_text()[:60])
    return load_side(folder)


TOY = ("toy", items_of())
OTHER_IDS = ("ids", [{"id": "x", "score": 1.0}])
# tasks of base and of new, the model of new, and what the notes say
LEFT_OUT = {
    "a task without common ids": (
        [TOY, ("ids", items_of())],
        [TOY, OTHER_IDS],
        "m",
        "left out: ids: the two logs have no question in common",
    ),
    "several runs of a task": (
        [TOY, ("more", items_of()), ("more", items_of(10))],
        [TOY, ("more", items_of())],
        "m",
        "left out: old has 2 runs of more; --drift compares one run with one",
    ),
    "a damaged log": ([TOY, ("cut", [])], [TOY], "m", "old: left out: "),
    "a task of one side": (
        [TOY, ("gone", items_of())],
        [TOY],
        "m",
        "gone is not compared: only old has its scores",
    ),
    "another model": (
        [TOY],
        [TOY],
        "m2",
        "the sides are different models, old: m, new: m2; what differs may be the models'",
    ),
    "nothing": ([TOY], [TOY], "m", ""),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_is_left_out_is_said(tmp_path, case, capsys):
    """The other task is compared."""
    base, new, model, expected = LEFT_OUT[case]
    folder_of(tmp_path / "old", base)
    folder_of(tmp_path / "new", new, model)
    out = tmp_path / "out"
    words = [str(tmp_path / name) for name in ("old", "new")]
    assert main([*words, "--drift", "--output", str(out)]) == 0
    report = json.loads((out / "drift.json").read_text())
    assert [record["benchmark"] for record in report["benchmarks"]] == ["toy"]
    assert len(report["notes"]) == bool(expected)
    for note in report["notes"]:
        assert note.startswith(expected)
        assert f"- {note}" in capsys.readouterr().out


OF_A_COMPARISON = (
    "--blind {other}",
    "--fail-on worse",
    "--paired-runs",
    "--all-pairs",
    "--questions 8",
)
REFUSED = [
    ("--drift", "--level 0.9"),
    ("--drift", "--min-overlap 0.5"),
    *(("--drift", option) for option in OF_A_COMPARISON),
    *(("--plan", option) for option in OF_A_COMPARISON),
]


@pytest.mark.parametrize(("mode", "option"), REFUSED)
def test_options_that_would_be_ignored_are_refused(tmp_path, mode, option):
    """Before a file is opened."""
    words = option.format(other=tmp_path / "other").split()
    with pytest.raises(ValueError, match=f"{words[0]} has no effect with {mode}"):
        main(["nowhere", "elsewhere", mode, *words])


def test_help_names_every_form_that_is_read():
    names = set(readers()) - {"score files", "table"}
    assert len(names) == 8
    for name in names:
        assert name in COMMAND.about
