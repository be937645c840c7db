"""`compare --blind`: which questions need eyes."""

import csv
import json
from typing import Any

import numpy as np
import pytest
from reader_logs import LOGS

from llava_integration.evaluator.answer import command as evaluate
from llava_integration.evaluator.answer.questions import GRAY, Question
from llava_integration.evaluator.compare.blind import (
    EYES,
    SOLVED,
    BlindLogs,
    part_weights,
)
from llava_integration.evaluator.compare.command import main
from llava_integration.evaluator.compare.comparison import build
from llava_integration.evaluator.compare.guessing import (
    check_free_text,
    guessing,
    option_count,
    rotation_count,
)
from llava_integration.evaluator.compare.readers import read_logs
from llava_integration.evaluator.compare.readers.lettered_options import (
    lettered_options,
)
from llava_integration.evaluator.compare.report import (
    PARTS_HEADER,
    part_cells,
    row_lines,
)
from llava_integration.evaluator.compare.sides import load_side, load_sides
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.errors import ContractError
from scripts.benchmarks.blind import Setting, simulate

# sides of 40 questions: the first 16 are solved blind, of which new wins 1, of the others 14
BASE = [0] * 4 + [1] * 12 + [0] * 16 + [1] * 8
NEW = [1] + [0] * 3 + [1] * 12 + [1] * 14 + [0] * 2 + [1] * 8
SOLVED_BLIND = [1] * 16 + [0] * 24


def table(path, scores, model="", **columns):
    """A CSV of items, scores and further columns."""
    names = ["item", "score", *(["model"] if model else []), *columns]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for number, score in enumerate(scores):
            more = [values[number] for values in columns.values()]
            writer.writerow([number, score, *([model] if model else []), *more])
    return path


def score_file(path, scores, model, choices=None, blind=None, **about):
    """A score file whose items have these fields; a tuple ``truth`` has one for each in turn."""
    truths = about.pop("truth", tuple(f"word {number}" for number in range(400)))
    if not isinstance(truths, tuple):
        truths = (truths,)
    items = []
    for number, score in enumerate(scores):
        item = {"id": number, "score": score, "cluster": str(number)}
        item["truth"] = truths[number % len(truths)]
        if choices:
            item["choices"] = choices
        items.append({**item, **about})
    provenance = {} if blind is None else {"answer_settings": {"blind": blind}}
    record = ScoreFile(
        benchmark="toy", metrics={}, items=items, model=model, provenance=provenance
    )
    return record.write(path)


def parts(tmp_path, blind, chance: float = 0, base=BASE, new=NEW):
    """The rows of a comparison with blind logs."""
    sides = load_sides(
        [
            table(tmp_path / "base.csv", base, "base"),
            table(tmp_path / "new.csv", new, "new"),
        ],
        [],
    )
    logs = tuple(load_side(path, blind=True) for path in blind)
    return build(sides, blind=BlindLogs(logs=logs, chance=chance)).rows[0]


def test_a_gain_of_questions_that_need_eyes_is_found_there(tmp_path):
    row = parts(tmp_path, [table(tmp_path / "blind.csv", SOLVED_BLIND, "blind")])
    solved, eyes = row.parts
    assert (solved.name, solved.questions) == (SOLVED, 16)
    assert (eyes.name, eyes.questions) == (EYES, 24)
    assert solved.difference == pytest.approx(100 / 16)
    assert eyes.difference == pytest.approx(100 * 14 / 24)
    assert (solved.verdict, eyes.verdict) == ("no difference shown", "better")
    low, high = eyes.interval
    assert 0 < low < eyes.difference < high
    # Holm over both
    assert eyes.p_holm == pytest.approx(2 * eyes.p)
    # both groups together are the whole
    whole = solved.questions * solved.difference + eyes.questions * eyes.difference
    assert whole / 40 == pytest.approx(row.result.difference)


def test_what_luck_and_missed_questions_can_explain_is_no_verdict():
    """Of four options 6 of 24 questions that need eyes are solved by luck: the weights of the
    second readings are 0 on average there, and on what can be solved blind."""
    solved_N = np.repeat([1, 1, 0], [16, 6, 18]).astype(bool)  # solvable, lucky, others
    weights = part_weights(solved_N, np.full(40, 0.25), 1)
    _, really_solved_N = weights[SOLVED]
    assert really_solved_N[16:].sum() == pytest.approx(0)
    assert really_solved_N[:16] == pytest.approx(np.ones(16))
    # of 20 solvable questions, 4 are missed
    solved_N = np.repeat([1, 0], [16, 4]).astype(bool)
    _, really_eyes_N = part_weights(solved_N, np.full(20, 0.25), 1)[EYES]
    assert really_eyes_N.sum() == pytest.approx(0)


SIMULATED = [
    # where the gain is, and how often each part shows a difference: below, above, in percent
    (Setting(knows=(0.6, 0.8)), "blind"),
    (Setting(knows=(0.6, 0.8), caught=0.8), "blind"),
    (Setting(knows=(0.6, 0.8), logs="both"), "blind"),
    (Setting(sees=(0.4, 0.6)), "visual"),
    (Setting(sees=(0.4, 0.6), logs="both"), "visual"),
]


@pytest.mark.parametrize(
    ("setting", "planted"), SIMULATED, ids=[setting.name for setting, _ in SIMULATED]
)
def test_a_planted_gain_is_found_where_it_is(setting, planted):
    """1,000 simulations: scripts/benchmarks/blind.py."""
    shown = simulate(setting, 60)
    rates = {"visual": shown.visual, "blind": shown.blind}
    assert rates.pop(planted) >= 0.8
    assert max(rates.values()) <= 0.12


def test_a_log_of_one_side_alone_is_refused(tmp_path):
    """It would make that side worse where it guesses."""
    sides = [
        score_file(tmp_path / "a.scores.json", BASE, "one"),
        score_file(tmp_path / "b.scores.json", NEW, "two"),
    ]
    blind = {}
    for model in ("one", "two", "three"):
        path = tmp_path / f"blind-{model}.scores.json"
        blind[model] = load_side(
            score_file(path, SOLVED_BLIND, model, blind=True), blind=True
        )

    def row_with(*models):
        logs = tuple(blind[model] for model in models)
        return build(load_sides(sides, []), blind=BlindLogs(logs=logs)).rows[0]

    row = row_with("one")
    assert row.parts == ()
    assert any("blind log of one alone" in note for note in row.notes)
    assert row_with("two").parts == ()
    assert len(row_with("one", "two").parts) == len(row_with("three").parts) == 2


def test_a_table_of_blind_scores_goes_with_logs_of_any_form(tmp_path):
    """It names the task and has no truth; another truth is refused."""
    sides = load_sides(
        [
            score_file(tmp_path / "a.scores.json", BASE, "one"),
            score_file(tmp_path / "b.scores.json", NEW, "two"),
        ],
        [],
    )
    path = table(tmp_path / "blind.csv", SOLVED_BLIND, "blind", task=["toy"] * 40)
    blind = BlindLogs(logs=(load_side(path, blind=True),))
    assert len(build(sides, blind=blind).rows[0].parts) == 2
    path = score_file(tmp_path / "c.scores.json", SOLVED_BLIND, "c", truth="y")
    blind = BlindLogs(logs=(load_side(path, blind=True),))
    row = build(sides, blind=blind).rows[0]
    assert row.parts == ()
    assert any("score both by the same annotations" in note for note in row.notes)


def test_a_sides_own_log_is_no_blind_log(tmp_path):
    row = parts(tmp_path, [table(tmp_path / "copy.csv", NEW, "copy")])
    assert row.parts == ()
    assert any("has the scores of a side" in note for note in row.notes)


# models of base, new and the blind logs ("": none is named), and what is said where it is refused
WHOSE = [
    ("one", "two", ["three"], None),
    ("one", "two", ["one", "two"], None),
    ("one", "two", ["one"], "blind log of base alone"),
    ("one seed1", "two", ["one seed1", "one seed2"], "blind log of base alone"),
    ("owner/One", "two", ["checkpoints/one/"], "blind log of base alone"),
    ("", "", ["one"], "base and new name no model"),
    ("", "", [""], "base and new and the blind log"),
    ("one", "two", [""], "names no model"),
    ("one", "", ["one"], "new names no model"),
    ("", "", ["one seed1", "one seed2"], "base and new name no model"),
    ("", "", ["", ""], None),
    ("", "", ["one", "two"], None),
    ("one", "one", ["one"], "both sides and the blind log name the model one"),
    ("one", "one", ["one", "one"], None),
    ("one", "one", ["three"], None),
]


@pytest.mark.parametrize(("base", "new", "logs", "refusal"), WHOSE)
def test_a_blind_log_that_may_be_of_one_side_alone_is_refused(
    tmp_path, base, new, logs, refusal
):
    sides = load_sides(
        [
            table(tmp_path / "base.csv", BASE, base),
            table(tmp_path / "new.csv", NEW, new),
        ],
        ["base", "new"],
    )
    blind_logs = []
    for number, model in enumerate(logs):
        scores = [*SOLVED_BLIND]
        scores[number] = 0  # no copies
        path = table(tmp_path / f"blind{number}.csv", scores, model)
        blind_logs.append(load_side(path, blind=True))
    blind = BlindLogs(logs=tuple(blind_logs), chance=0)
    (row,) = build(sides, blind=blind).rows
    if refusal is None:
        assert len(row.parts) == 2
        is_sure = all([base, new, *logs]) and base != new
        is_noted = any("are taken for those" in note for note in row.notes)
        assert is_noted != (is_sure or logs == ["three"])
    else:
        assert row.parts == ()
        assert any(refusal in note for note in row.notes)


def test_a_copy_of_a_blind_log_is_no_second_log(tmp_path):
    """Of models that are named alike, or not at all, a log of each side is needed."""
    for model in ("", "one"):
        paths = []
        for name in ("blind", "copy"):
            path = tmp_path / f"{name}.csv"
            paths.append(table(path, SOLVED_BLIND, model))
        sides = load_sides(
            [
                table(tmp_path / "base.csv", BASE, model),
                table(tmp_path / "new.csv", NEW, model),
            ],
            ["base", "new"],
        )
        logs = tuple(load_side(path, blind=True) for path in paths)
        (row,) = build(sides, blind=BlindLogs(logs=logs, chance=0)).rows
        assert row.parts == ()
        assert any("of one side alone" in note for note in row.notes)


def test_a_model_that_declines_tells_nothing(tmp_path):
    """It is right less often than by guessing, or on hardly any question of free text."""
    blind = [table(tmp_path / "blind.csv", [1] * 5 + [0] * 395, "blind")]
    sides = {"base": BASE * 10, "new": NEW * 10}
    row = parts(tmp_path, blind, chance=0.25, **sides)
    assert row.parts == ()
    assert any(
        "right on 1.2% of the questions, guessing on 25.0%" in n for n in row.notes
    )
    assert len(parts(tmp_path, blind, chance=0, **sides).parts) == 2
    for right in (0, 4):
        scores = [1] * right + [0] * (400 - right)
        blind = [table(tmp_path / "blind.csv", scores, "blind")]
        row = parts(tmp_path, blind, chance=0, **sides)
        assert row.parts == ()
        assert any(
            f"the blind log of blind is right on {right} of 400 questions" in note
            for note in row.notes
        )


def test_chances_are_those_of_the_options(tmp_path):
    def note_of(**about):
        base = score_file(tmp_path / "a.scores.json", BASE * 2, "a", **about)
        new = score_file(tmp_path / "b.scores.json", NEW * 2, "b", **about)
        few = score_file(
            tmp_path / "n.scores.json", [1] * 5 + [0] * 75, "n", blind=True, **about
        )
        blind = BlindLogs(logs=(load_side(few, blind=True),))
        notes = build(load_sides([base, new], []), blind=blind).rows[0].notes
        return " ".join(notes)

    assert "guessing on 50.0%" in note_of(truth="yes")
    assert "guessing on 20.0%" in note_of(choices=list("abcde"))
    assert "guessing on" not in note_of()


def blind_row(tmp_path, chance=None, right=16, times=1, **about: Any):
    """The row of 40 questions, ``times`` as many, of score files whose items have these fields."""
    files = {}
    for model, scores in {
        "base": BASE * times,
        "new": NEW * times,
        "blind": ([1] * right + [0] * (40 - right)) * times,
    }.items():
        path = tmp_path / f"{model}.scores.json"
        files[model] = score_file(path, scores, model, **about)
    sides = load_sides([files["base"], files["new"]], [])
    blind = BlindLogs(logs=(load_side(files["blind"], blind=True),), chance=chance)
    (row,) = build(sides, blind=blind).rows
    return row


# the right answer, of questions whose options no log has -> what is said; "": they are split
UNKNOWN_OPTIONS = [
    ("A", "options of 40 of 40 questions, but letters as the right answers"),
    ("(B)", "letters as the right answers"),
    (["C"], "letters as the right answers"),
    (2, "digits as the right answers"),
    (None, "nor the right answers"),
    (("a", "b", "c"), "letters as the right answers"),
    ("(d)", "letters as the right answers"),
    (("true", "false"), "but 2 right answers in all"),
    (("left", "Left", "right"), "but 2 right answers in all"),
    (("10", "20", "30"), "but 3 right answers in all"),
    (tuple(f"{number} red buses" for number in range(40)), ""),
    (tuple([f"{number} red", "dark red"] for number in range(40)), ""),
]


@pytest.mark.parametrize(("truth", "refusal"), UNKNOWN_OPTIONS)
def test_questions_whose_options_are_unknown_are_not_taken_for_free_text(
    tmp_path, truth, refusal
):
    row = blind_row(tmp_path, truth=truth)
    if refusal:
        assert row.parts == ()
        assert any(refusal in n and "--blind-chance" in n for n in row.notes)
    else:
        assert len(row.parts) == 2
        assert any(
            "40 of 40 questions have no options in the logs and are taken for free text"
            in note
            for note in row.notes
        )
    assert len(blind_row(tmp_path, chance=0.25, truth=truth).parts) == 2


@pytest.mark.parametrize("truth", ["yes", "No.", ["yes"], ["No"]])
def test_yes_and_no_are_two_options_however_they_are_written(truth):
    """HELM's are lists."""
    assert option_count({"truth": truth}) == 2


def test_a_group_whose_yes_and_no_cannot_be_balanced_has_questions_and_no_mean(
    tmp_path,
):
    """The blind log is right on each yes, and on 6 of 20 times no: not by luck alone."""
    truth = ("yes", "no")
    files = {}
    for model, scores in {
        "base": BASE,
        "new": NEW,
        "blind": [1, 0] * 14 + [1] * 12,
    }.items():
        path = tmp_path / f"{model}.scores.json"
        files[model] = score_file(path, scores, model, truth=truth)
    blind = BlindLogs(logs=(load_side(files["blind"], blind=True),))
    sides = load_sides([files["base"], files["new"]], [])
    (row,) = build(sides, blind=blind).rows
    solved, eyes = row.parts
    assert (solved.questions, eyes.questions) == (26, 14)
    assert part_cells(row, eyes)[1:] == (EYES, "14", *[""] * 6, "no verdict")
    assert eyes.to_dict()["base"] is None
    assert not any("solve no more questions" in note for note in row.notes)
    assert any("the answer no the blind logs solve no more" in n for n in row.notes)


@pytest.mark.parametrize(
    ("truths", "remedy"),
    [
        (list("ABCD") * 5, "there are 4 options, add --blind-chance 0.25"),
        (["(a)", "(b)", "B"] * 5, "there are 2 options, add --blind-chance 0.5"),
        (list("012") * 5, "there are 3 options, add --blind-chance 0.333"),
        ([""] * 5, "add --blind-chance 0.25 for four options"),
        (["A"] * 5, "add --blind-chance 0.25 for four options"),
    ],
)
def test_it_says_which_chance_to_type(truths, remedy):
    with pytest.raises(ContractError, match=remedy):
        check_free_text(truths, len(truths))


def test_the_chance_that_is_set_is_that_of_questions_without_options(tmp_path):
    known: list[dict[str, Any]] = [{"choices": list("abcd")}, {"truth": "yes"}]
    for about in known:
        row = blind_row(tmp_path, chance=0.9, right=20, **about)
        assert len(row.parts) == 2
        assert any("--blind-chance is not used" in note for note in row.notes)
    row = blind_row(tmp_path, chance=0.9, right=12)
    assert any("guessing on 90.0%" in note for note in row.notes)


def test_all_rotations_of_a_question_must_be_guessed(tmp_path):
    """MMBench: 12 % are less than one in four, and more than one in 256, so the questions are
    split; as a guess may go with the option, none is known to be solved."""
    question: dict[str, Any] = {"truth": "A", "choices": list("abcd")}
    row = blind_row(tmp_path, right=5, times=10, **question)
    assert any(
        "right on 12.5% of the questions, guessing on 25" in n for n in row.notes
    )
    rotated: dict[str, Any] = {**question, "rows": [{"text": "", "correct": 0}] * 4}
    turned: dict[str, Any] = {**question, "turns": 4}
    for about in (rotated, turned):
        row = blind_row(tmp_path, right=5, times=10, **about)
        solved, eyes = row.parts
        assert solved.verdict == "no verdict"
        assert eyes.verdict == "better"
        assert any("no more questions than guessing may" in note for note in row.notes)
    run = load_side(tmp_path / "blind.scores.json", blind=True).runs["toy"][0]
    guessed = guessing([run], None)
    assert guessed.least_N == pytest.approx(1 / 256)
    assert guessed.most_N == pytest.approx(1 / 4)


# folder of logs -> benchmark -> number of options of a question, and of its answers that count
OPTIONS_OF_LOGS = {
    "vlmevalkit": {
        "AI2D_TEST": (4, 1),
        "MMBench_DEV_EN": (4, 4),
        "MMVP": (2, 2),
        "ChartQA_TEST": (0, 1),
    },
    "lmms_eval": {
        "mmbench": (2, 2),
        "mmstar average": (4, 1),
        "ai2d exact_match": (4, 1),
        "realworldqa exact_match": (2, 1),
        "chartqa relaxed_overall": (0, 1),
    },
    "evalscope/0.17.1": {None: (2, 1)},
    "evalscope/1.1.0": {None: (2, 1)},
    "evalscope/1.14.1": {
        "general_mcq accuracy": (2, 1),
        "general_qa Rouge-L-R": (0, 1),
    },
    "opencompass/0.3.9": {
        "toy_mcq accuracy": (2, 1),
        "toy_ppl accuracy": (2, 1),
    },
    "opencompass/0.5.4": {"toy_mcq accuracy": (2, 1), "toy_ppl accuracy": (2, 1)},
    "helm": {None: (2, 1)},
    "lighteval/0.13.0": {"toy_mc|0 acc": (2, 1), "toy_gen|0 em": (0, 1)},
    "lighteval/0.8.1": {"toy_mc|0 acc": (2, 1), "toy_gen|0 em": (0, 1)},
}


@pytest.mark.parametrize(
    ("prompt", "truth", "options"),
    [
        ("Which?\nA. this\nB. that\nAnswer:", "B", ["this", "that"]),
        ("Which? (A) one, or none (B) two", "(A)", ["one, or none", "two"]),
        ("Which? Options: A: a, B: b, C: c\nAnswer", "C", ["a", "b", "c"]),
        ("Which? A. one B. two Please answer", ["A"], ["one", "two Please answer"]),
        ("A) this\nB) that\nC) it\n\n1 + 1?\nA) 1\nB) 2\n", "B", ["1", "2"]),
        ("Is A. Smith (B) old?\nA. yes\nB. no", "A", ["yes", "no"]),
        ("Only respond with A, B.\nWhich one is it?", "A", []),
        ("Which?\nA. this\nB. that", "D", []),  # the options are others
        ("Which?\nA. this\nB. that", "this", []),
        ("Which of these?\nA. this\nB. that", ["A", "B"], []),  # both are right
        (None, "A", []),
    ],
)
def test_options_are_found_in_prompts(prompt, truth, options):
    assert lettered_options(prompt, truth) == options


@pytest.mark.parametrize("folder", OPTIONS_OF_LOGS)
def test_options_are_read_of_logs(folder):
    if folder.startswith("lighteval"):  # its details are Parquet files
        pytest.importorskip("pyarrow")
    logs = read_logs(LOGS / folder)
    for benchmark, expected in OPTIONS_OF_LOGS[folder].items():
        items = []
        for _, log in logs:
            if benchmark in (None, log.benchmark):
                items += log.items
        found = {(option_count(item), rotation_count(item)) for item in items}
        assert found == {expected}, benchmark


def test_a_blind_model_that_always_says_yes_moves_no_points(tmp_path):
    """New says yes more often, and sees no better: in each group yes and no count as in all
    questions, so that neither group shows a difference. The blind log says yes 4 times in 5."""
    setting = Setting(options=2, says_yes=(0.5, 0.8, 0.8))
    shown = simulate(setting, 20)
    assert (shown.visual, shown.blind) == (0, 0)
    # without that, both would: the log is right where the answer is yes
    truth = ["yes", "no"] * 20
    said = {
        "base": [0, 1] * 20,
        "new": [1, 0] * 19 + [1, 1],
        "always yes": [1, 0] * 20,
    }
    files = {}
    for model, scores in said.items():
        items = [
            {"id": number, "score": score, "truth": truth[number]}
            for number, score in enumerate(scores)
        ]
        record = ScoreFile(benchmark="toy", metrics={}, items=items, model=model)
        files[model] = record.write(tmp_path / f"{model}.scores.json")
    blind = BlindLogs(logs=(load_side(files["always yes"], blind=True),))
    (row,) = build(load_sides([files["base"], files["new"]], []), blind=blind).rows
    assert [part.verdict for part in row.parts] == ["no verdict", "no verdict"]
    assert any("yes and no count in both groups" in note for note in row.notes)


def test_answers_without_pictures_are_no_side_and_those_with_are_no_blind_log(tmp_path):
    score_file(tmp_path / "a" / "seen.scores.json", BASE, "a", blind=False)
    score_file(tmp_path / "a" / "blind.scores.json", SOLVED_BLIND, "a", blind=True)
    side = load_side(tmp_path / "a")
    assert len(side.runs["toy"]) == 1
    assert any("answers without the pictures" in note for note in side.notes)
    assert len(load_side(tmp_path / "a", blind=True).runs["toy"]) == 1
    with pytest.raises(ContractError, match="needs those of bench-mllm --blind"):
        load_side(tmp_path / "a" / "seen.scores.json", blind=True)


def test_the_command_and_its_reports(tmp_path, capsys):
    words = [
        str(table(tmp_path / "base.csv", BASE, "base")),
        str(table(tmp_path / "new.csv", NEW, "new")),
        "--blind",
        str(table(tmp_path / "blind.csv", SOLVED_BLIND, "blind")),
        "--blind-chance",
        "0",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "### Which questions need eyes" in shown
    (row,) = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert [part["verdict"] for part in row["parts"]] == [
        "no difference shown",
        "better",
    ]
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "Which questions need eyes" in page
    assert "need eyes</td>" in page
    with pytest.raises(ValueError, match=r"--blind-chance 1\.5 is invalid"):
        main([*words[:-4], "--blind-chance", "1.5"])


def test_scores_that_are_neither_right_nor_wrong_are_not_split(tmp_path):
    blind = [table(tmp_path / "blind.csv", SOLVED_BLIND, "blind")]
    row = parts(tmp_path, blind, base=[5 * score for score in BASE])
    assert row.parts == ()
    assert any("not from 0 to 1" in note for note in row.notes)


def test_a_blind_picture_is_gray_and_of_the_same_size(tmp_path):
    from PIL import Image

    Image.new("RGB", (14, 9), (255, 0, 0)).save(tmp_path / "red.png")
    question = Question(id=1, text="", prompt="", image="red.png")
    blind = question.open_image(str(tmp_path), blind=True)
    assert (blind.size, blind.getcolors()) == ((14, 9), [(14 * 9, GRAY)])
    assert question.open_image(str(tmp_path)).getcolors() == [(14 * 9, (255, 0, 0))]


def test_blind_answers_are_not_mixed_with_others(tmp_path):
    """Settings of answers say it; those of an earlier release are of answers with pictures."""
    from chat_server import ChatServer, serving
    from PIL import Image

    Image.new("RGB", (14, 9), (255, 0, 0)).save(tmp_path / "red.png")
    row = {"question_id": 1, "image": "red.png", "text": "What?"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    output = tmp_path / "answers.jsonl"
    files = (
        "--question-file",
        f"{tmp_path}/questions.jsonl",
        "--image-folder",
        f"{tmp_path}",
    )
    state = ChatServer(["tiny"])
    with serving(state) as url:
        words = ["--endpoint", url, *files, "--answers-file", str(output)]
        assert evaluate.main(words) == 0
        settings = tmp_path / "answers.jsonl.settings.json"
        record = json.loads(settings.read_text())
        assert record.pop("blind") is False
        settings.write_text(json.dumps(record))  # as an earlier release wrote it
        assert evaluate.main(words) == 0
        with pytest.raises(ContractError, match="blind False -> True"):
            evaluate.main([*words, "--blind"])
        other = tmp_path / "blind.jsonl"
        assert evaluate.main([*words[:-1], str(other), "--blind"]) == 0
    seen, blind = (json.loads(path.read_text())["text"] for path in (output, other))
    assert seen != blind


def test_what_is_left_out_of_blind_logs_is_noted(tmp_path):
    folder = tmp_path / "blind"
    score_file(folder / "blind.scores.json", SOLVED_BLIND, "blind", blind=True)
    score_file(folder / "seen.scores.json", NEW, "blind", blind=False)
    sides = [
        score_file(tmp_path / "a.scores.json", BASE, "a"),
        score_file(tmp_path / "b.scores.json", NEW, "b"),
    ]
    blind = BlindLogs(logs=(load_side(folder, blind=True),))
    comparison = build(load_sides(sides, []), blind=blind)
    assert len(comparison.rows[0].parts) == 2
    assert any(
        "left out" in note and "seen.scores.json" in note for note in comparison.notes
    )


def test_a_note_names_its_benchmark_once(tmp_path):
    sides = [
        score_file(tmp_path / "a.scores.json", BASE, "a"),
        score_file(tmp_path / "b.scores.json", NEW, "b"),
    ]
    for truth, note in (("y", "toy: not split: the truth"), ("x", "toy: not split")):
        log = score_file(tmp_path / "c.scores.json", [0] * 40, "c", truth=truth)
        blind = BlindLogs(logs=(load_side(log, blind=True),))
        lines = row_lines(build(load_sides(sides, []), blind=blind).rows)
        (line,) = [line for line in lines if "split" in line]
        assert line.startswith(note)
        assert line.count("toy") == 1


def test_the_note_on_the_headline_number_is_of_those_that_are_no_mean_score(tmp_path):
    """MMBench's rule is the mean; MME's points are none."""

    def notes_of(benchmark, scores, **about):
        files = []
        for model in ("base", "new", "blind"):
            items = []
            for number, score in enumerate(scores[model]):
                item = {"id": number, "score": score, "truth": "yes", "category": "x"}
                items.append({**item, "cluster": str(number // 2), **about})
            record = ScoreFile(
                benchmark=benchmark, metrics={}, items=items, model=model
            )
            files.append(record.write(tmp_path / f"{benchmark}-{model}.scores.json"))
        sides = load_sides(files[:2], [])
        blind = BlindLogs(logs=(load_side(files[2], blind=True),))
        (row,) = build(sides, blind=blind).rows
        assert len(row.parts) == 2
        return [note for note in row.notes if "not the headline number" in note]

    scores = {"base": BASE, "new": NEW, "blind": [1, 0] * 20}
    assert notes_of("mmbench", scores) == []
    assert len(notes_of("mme", scores)) == 1


def test_a_part_without_questions_has_no_numbers(tmp_path):
    log = table(tmp_path / "blind.csv", [1] * 40, "blind")
    row = parts(tmp_path, [log])
    _, eyes = row.parts
    cells = part_cells(row, eyes)
    assert len(cells) == len(PARTS_HEADER)
    assert cells[1:] == (EYES, "0", *[""] * 6, "no verdict")
    assert eyes.to_dict()["base"] is None
    assert eyes.to_dict()["difference"] is None


def test_one_item_is_no_plural(tmp_path):
    sides = [table(tmp_path / f"{name}.csv", [1]) for name in ("base", "new")]
    (row,) = build(load_sides(sides, [])).rows
    assert row.power_line().startswith("1 item,")
