"""Answers in batches, over ranks, after a kill: the same as LLaVA's own program gives one by
one."""

import base64
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_integration.evaluator.answer import command as evaluate
from llava_integration.evaluator.answer import questions
from llava_integration.plug.checkpoints import sample_sha256
from llm2clip_plugin import precision
from llm2clip_plugin.errors import ContractError

LLAVAS_DTYPE = ("--dtype", "float16")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(path):
    return [(row["question_id"], row["prompt"], row["text"]) for row in read(path)]


def words(world, checkpoint, output, *more):
    """The command's words."""
    return [
        *(
            "--model-path",
            checkpoint,
            "--question-file",
            world.questions,
            "--image-folder",
            world.images,
        ),
        *("--answers-file", output, "--max_new_tokens", "12", "--workers", "0", *more),
    ]


@pytest.fixture
def run(world, checkpoint, monkeypatch, capsys):
    """Run the command in this process; returns what it printed."""

    def run(output, *more):
        command = words(world, checkpoint, output, *LLAVAS_DTYPE, *more)
        assert evaluate.main([*map(str, command)]) == 0
        return capsys.readouterr().out

    return run


def llavas_answers(world, checkpoint, output):
    """The answers of LLaVA's own model_vqa_loader."""
    arguments = words(
        world, checkpoint, output, "--conv-mode", "vicuna_v1", "--temperature", "0"
    )
    arguments = (
        arguments[: arguments.index("--workers")]
        + arguments[arguments.index("--workers") + 2 :]
    )
    world.forked("-m", "llava.eval.model_vqa_loader", *arguments)
    return output


@pytest.fixture(scope="session")
def theirs(world, checkpoint):
    return llavas_answers(world, checkpoint, world.root / "theirs" / "answers.jsonl")


@pytest.mark.both_stacks
def test_same_answers_as_llavas_own_program(theirs, run, tmp_path):
    """At batch 1, in LLaVA's precision: field by field, but for the random id."""
    run(tmp_path / "answers.jsonl")
    for ours, expected in zip(
        read(tmp_path / "answers.jsonl"), read(theirs), strict=True
    ):
        assert set(ours) == set(expected)
        assert {**ours, "answer_id": ""} == {**expected, "answer_id": ""}


@pytest.mark.both_stacks
def test_without_dtype_the_machine_chooses_and_a_rerun_keeps_it(
    world, checkpoint, tmp_path, monkeypatch, capsys
):
    """Also on another machine, which computes another one faster."""
    output = tmp_path / "answers.jsonl"
    command = [*map(str, words(world, checkpoint, output, "--batch-size", "5"))]
    assert evaluate.main(command) == 0
    chosen = json.loads(questions.settings_file(output).read_text())["dtype"]
    expected = torch.float16
    if not torch.cuda.is_available():
        expected = precision.fastest_dtype(torch.device("cpu"))
    assert getattr(torch, chosen) is expected
    monkeypatch.setattr(precision, "fastest_dtype", lambda device: torch.float64)
    output.unlink()
    assert evaluate.main(command) == 0
    assert "answers" in capsys.readouterr().out
    assert json.loads(questions.settings_file(output).read_text())["dtype"] == chosen


@pytest.mark.both_stacks
def test_batches_answer_as_one_by_one(theirs, run, tmp_path):
    """Prompts of two lengths and answers that end at different tokens share a batch; float32, so
    ties don't flip."""
    for size in (1, 5):
        run(tmp_path / f"by-{size}.jsonl", "--batch-size", size, "--dtype", "float32")
    one_by_one = texts(tmp_path / "by-1.jsonl")
    assert texts(tmp_path / "by-5.jsonl") == one_by_one
    assert len({text for *_, text in one_by_one}) > 1, (
        "a model that always says the same shows nothing"
    )


def test_blind_answers_are_those_to_gray_pictures(world, run, tmp_path):
    """With --blind the answers are those to a folder of gray pictures of the same sizes."""
    for path in Path(world.images).rglob("*"):
        if path.is_file():
            gray = tmp_path / "gray" / path.relative_to(world.images)
            gray.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(path) as image:
                Image.new("RGB", image.size, questions.GRAY).save(gray, "PNG")
    common = ("--batch-size", "5", "--dtype", "float32")
    run(tmp_path / "blind.jsonl", "--blind", *common)
    run(tmp_path / "gray.jsonl", "--image-folder", tmp_path / "gray", *common)
    assert texts(tmp_path / "blind.jsonl") == texts(tmp_path / "gray.jsonl")


def test_anyres_answers_as_llavas_own_program(world, run, tmp_path):
    """Finetuned with ``spatial_unpad`` (LLaVA 1.5 trains on whole pictures), then asked about tiles
    as in LLaVA 1.6."""
    folder = tmp_path / "llava-anyres"
    merge = ("--mm_patch_merge_type", "spatial_unpad", "--image_aspect_ratio", "anyres")
    world.stage(
        "finetune",
        f"llm2clip:{world.towers['clip']}",
        folder,
        *merge,
        "--learning_rate",
        "5e-3",
    )
    config = json.loads((folder / "config.json").read_text())
    assert (config["mm_patch_merge_type"], config["image_aspect_ratio"]) == (
        "spatial_unpad",
        "anyres",
    )
    config["image_grid_pinpoints"] = [[28, 56], [56, 28], [56, 56]]
    (folder / "config.json").write_text(json.dumps(config))
    run(tmp_path / "ours.jsonl", "--model-path", folder)
    assert texts(tmp_path / "ours.jsonl") == texts(
        llavas_answers(world, folder, tmp_path / "theirs.jsonl")
    )
    # pictures of several shapes in a batch: lists of different numbers of tiles
    for size in (1, 5):
        run(
            tmp_path / f"by-{size}.jsonl",
            "--model-path",
            folder,
            "--batch-size",
            size,
            "--dtype",
            "float32",
        )
    assert texts(tmp_path / "by-5.jsonl") == texts(tmp_path / "by-1.jsonl")


def test_killed_and_started_again(theirs, run, tmp_path, monkeypatch):
    output = tmp_path / "answers.jsonl"
    book = questions.AnswersFile.write
    calls = []

    def killed(self, answers):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(answers))
        book(self, answers)

    monkeypatch.setattr(questions.AnswersFile, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        run(output, "--batch-size", "2")
    assert not output.exists()
    (torn,) = (output.with_name("answers.jsonl.partial")).glob("*.jsonl")
    torn.write_text(torn.read_text()[:-30])  # the last line was on its way to the disk
    monkeypatch.setattr(
        questions.AnswersFile,
        "write",
        lambda self, answers: (calls.append(len(answers)), book(self, answers)),
    )
    calls.clear()
    run(output, "--batch-size", "2")
    assert sum(calls) == 12 - 5
    assert texts(output) == texts(theirs)
    assert not output.with_name("answers.jsonl.partial").exists()
    assert "is complete" in run(output, "--batch-size", "2")


def test_two_processes_at_once(world, checkpoint, theirs, tmp_path):
    """Under torchrun, as on a node."""
    output = tmp_path / "answers.jsonl"
    launcher = [sys.executable, "-m", "llm2clip_plugin.launch", "--nproc_per_node", "2"]
    launcher += ["-m", "llm2clip_plugin.cli", "llava", "evaluate"]
    options = (*LLAVAS_DTYPE, "--batch-size", "3")
    world.run(*launcher, *words(world, checkpoint, output, *options))
    assert texts(output) == texts(theirs)


def test_other_settings_are_not_mixed_in(run, tmp_path, checkpoint):
    output = tmp_path / "answers.jsonl"
    run(output)
    with pytest.raises(ContractError, match=r"max_new_tokens 12 -> 3"):
        run(output, "--max_new_tokens", "3")
    run(output, "--max_new_tokens", "3", "--overwrite")
    assert json.loads(questions.settings_file(output).read_text())[
        "model_sample_sha256"
    ] == sample_sha256(checkpoint)
    (tmp_path / "foreign.jsonl").write_text("{}\n")
    with pytest.raises(ContractError, match="another program"):
        run(tmp_path / "foreign.jsonl")


def test_chunks_are_llavas(world):
    from llava.eval.model_vqa_loader import get_chunk

    asked = questions.read_questions(world.questions)
    for chunks in (1, 5, 7):
        for index in range(chunks):
            if index * -(-12 // chunks) < 12:
                assert evaluate.chunk(asked, chunks, index) == get_chunk(
                    asked, chunks, index
                )
    assert evaluate.chunk(asked, 5, 4) == []
    with pytest.raises(ValueError, match="0 to 4"):
        evaluate.chunk(asked, 5, 5)


def test_science_questions_with_and_without_image(world, run, tmp_path, checkpoint):
    """ScienceQA's file: text-only questions share a run with pictured ones, as in LLaVA's
    model_vqa_science."""
    name = next(world.images.iterdir()).name
    said = (
        "<image>\nWhich colour?\nA. red\nB. no",
        "Say a colour.",
        "Say a longer colour, if you please.",
    )
    rows = [
        {"id": str(7 + n), "conversations": [{"from": "human", "value": text}]}
        for n, text in enumerate(said)
    ]
    rows[0]["image"] = name
    file = tmp_path / "science.json"
    file.write_text(json.dumps(rows))
    options = ("--question-file", file, "--single-pred-prompt", "--dtype", "float32")
    run(tmp_path / "one.jsonl", *options)
    run(tmp_path / "three.jsonl", *options, "--batch-size", "3")
    assert texts(tmp_path / "one.jsonl") == texts(tmp_path / "three.jsonl")
    suffix = "\nAnswer with the option's letter from the given choices directly."
    prompts = [prompt for _, prompt, _ in texts(tmp_path / "one.jsonl")]
    assert prompts[:2] == [
        f"<image>\nWhich colour?\nA. red\nB. no{suffix}",
        f"Say a colour.{suffix}",
    ]


def test_table_questions_rotate(world, run, tmp_path):
    """MMBench's file: rounds, hints, options and letters as LLaVA's model_vqa_mmbench writes
    them."""
    image = base64.b64encode(next(world.images.iterdir()).read_bytes()).decode()
    file = tmp_path / "bench.tsv"
    head = "index\tquestion\thint\tA\tB\tC\tD\timage"
    file.write_text(
        f"{head}\n3\tWhich?\tNA\tred\tblue\tgreen\tN/A\t{image}\n"
        f"4\tIs it?\tLook.\tyes\tno\t\t\t{image}\n"
    )
    options = (
        "--question-file",
        file,
        "--all-rounds",
        "--single-pred-prompt",
        "--lang",
        "cn",
        "--batch-size",
        "4",
    )
    run(tmp_path / "answers.jsonl", *options)
    rows = read(tmp_path / "answers.jsonl")
    rounds = [
        (row["question_id"], row["round_id"], "".join(row["option_char"]))
        for row in rows
    ]
    assert rounds == [
        (3, 0, "ABC"),
        (3, 1, "BCA"),
        (3, 2, "CAB"),
        (4, 0, "AB"),
        (4, 1, "BA"),
    ]
    assert rows[1]["prompt"] == "Which?\nA. blue\nB. green\nC. red"
    assert rows[1]["options"] == [
        "blue",
        "green",
        "red",
    ]
    assert rows[4]["prompt"] == "Look.\nIs it?\nA. no\nB. yes"
    asked = questions.read_questions(file, directly=True, all_rounds=True, lang="cn")
    assert asked[0].text.endswith("C. green\n请直接回答选项字母。")


@pytest.mark.parametrize(
    "environment, device, visible, expected",
    [
        ({}, "auto", None, (0, 1)),
        (
            {
                "RANK": "3",
                "WORLD_SIZE": "4",
                "LOCAL_RANK": "1",
                "CUDA_VISIBLE_DEVICES": "4,6",
            },
            "auto",
            "6",
            (3, 4),
        ),
        (
            {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "2"},
            "cuda",
            "2",
            (5, 8),
        ),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "cpu", "", (1, 2)),
    ],
)
def test_each_rank_sees_its_own_gpu(
    monkeypatch, environment, device, visible, expected
):
    names = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "SLURM_LOCALID",
    )
    for name in (*names, "CUDA_VISIBLE_DEVICES"):
        # so that it is put back afterwards, whatever is written into it here
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert evaluate.choose_device(device) == expected
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


@pytest.mark.both_stacks
def test_a_question_may_name_the_image_as_llavas_training_data_does(
    theirs, world, run, tmp_path
):
    """``<image>`` in a question's text is not a second image, on which LLaVA's code fails."""
    rows = read(world.questions)
    for row in rows[:3]:
        row["text"] = f"<image>\n{row['text']}"
    asked = tmp_path / "questions.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tmp_path / "answers.jsonl", "--question-file", asked)
    answers = [text for _, _, text in texts(tmp_path / "answers.jsonl")]
    assert answers == [text for _, _, text in texts(theirs)]
