"""``llm2clip llava evaluate --endpoint``: a served model answers a question file, whatever the
server does."""

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from chat_server import ChatServer, close, raw, sees, serving, stall, status
from golden_mllm import ROOT as GOLDEN
from PIL import Image

from llava_integration.evaluator.answer import command as evaluate
from llava_integration.evaluator.answer import served
from llava_integration.evaluator.answer.questions import read_questions
from llava_integration.evaluator.benchmarks import bench
from llm2clip_plugin.cli import main
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.hub import Retry


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions about images of every kind, one without an image."""
    folder = tmp_path_factory.mktemp("questions")
    (folder / "images").mkdir()
    noise = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by a quarter
    modes = {
        "gray.png": "L",
        "other.bmp": "RGB",
        "plain.jpg": "RGB",
        "plain.png": "RGB",
        "transparent.png": "RGBA",
    }
    for name, mode in {**modes, "rotated.jpg": "RGB"}.items():
        image = Image.fromarray(
            noise.integers(0, 255, (9, 14, len(mode)), dtype=np.uint8).squeeze(), mode
        )
        image.save(
            folder / "images" / name,
            **({"exif": exif} if name == "rotated.jpg" else {}),
        )
    names = sorted([*modes, "rotated.jpg"])
    rows = [
        {
            "question_id": f"q{n}",
            "image": names[n % 6],
            "text": f"What is in {n}?\nShort.",
        }
        for n in range(11)
    ]
    rows.append({"question_id": "q11", "text": "Say something."})
    (folder / "questions.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between retries; no key, no proxy."""
    monkeypatch.setattr(
        served,
        "Retry",
        lambda tries, first_pause: Retry(tries=tries, first_pause=first_pause / 1000),
    )
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


def words(folder: Path, url: str, output: Path, *more: str) -> list[str]:
    files = (
        "--question-file",
        f"{folder}/questions.jsonl",
        "--image-folder",
        f"{folder}/images",
    )
    return ["--endpoint", url, *files, "--answers-file", str(output), *more]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check(folder: Path, output: Path) -> None:
    """The answers are those of all questions, in order, about the pixels that LLaVA sees."""
    questions = read_questions(folder / "questions.jsonl")
    rows = read(output)
    assert [row["question_id"] for row in rows] == [
        question.id for question in questions
    ]
    for row, question in zip(rows, questions, strict=True):
        image = question.open_image(f"{folder}/images") if question.image else None
        assert row["text"] == sees(question.text, image), question


def test_answers_name_the_model_and_the_server(folder: Path, tmp_path: Path) -> None:
    state = ChatServer(["tiny"])
    state.gather = 4
    output = tmp_path / "answers.jsonl"
    with serving(state) as url:
        host = url.removesuffix("/v1")  # /v1 is added
        assert (
            evaluate.main(
                words(
                    folder, host, output, "--concurrency", "4", "--max_new_tokens", "7"
                )
            )
            == 0
        )
    check(folder, output)
    assert state.most_in_flight == 4
    settings = {
        key: value for key, value in state.bodies[0].items() if key != "messages"
    }
    assert settings == {"model": "tiny", "temperature": 0.0, "max_tokens": 7}
    row = read(output)[0]
    assert row["model_id"] == "tiny"
    assert row["metadata"] == {
        "endpoint": url,
        "finish_reason": "stop",
    }
    kept = json.loads((tmp_path / "answers.jsonl.settings.json").read_text())
    assert (kept["endpoint"], kept["served_model"], kept["served_root"]) == (
        host,
        "tiny",
        "/models/tiny",
    )


def test_answers_are_about_the_pictures_that_are_there(
    folder: Path, tmp_path: Path
) -> None:
    """A run that resumes asks again about those that changed; one that is complete is refused."""
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    output = tmp_path / "answers.jsonl"

    def replace(name: str, source: str) -> None:
        Image.open(folder / "images" / source).save(mine / "images" / name)

    state = ChatServer(["tiny"])
    with serving(state) as url:
        state.refuses = "in 10"
        assert evaluate.main(words(mine, url, output)) == 1
        state.refuses = ""
        replace("plain.png", "rotated.jpg")
        assert evaluate.main(words(mine, url, output)) == 0
        assert state.answered == 11 + 3  # q10, and q3 and q9 once more
        check(mine, output)
        assert evaluate.main(words(mine, url, output)) == 0
        replace("gray.png", "plain.png")
        with pytest.raises(ContractError, match="questions' pictures changed since"):
            evaluate.main(words(mine, url, output))
        assert evaluate.main(words(mine, url, output, "--overwrite")) == 0
    check(mine, output)


def test_a_served_model_that_was_trained_again_is_another_one(
    folder: Path, tmp_path: Path
) -> None:
    """Where the server names a folder of this machine; one elsewhere is known by its name alone."""
    weights = tmp_path / "models" / "tiny" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"before")
    output = tmp_path / "answers.jsonl"
    state = ChatServer(["tiny"])
    state.root = str(tmp_path / "models")
    with serving(state) as url:
        assert evaluate.main(words(folder, url, output)) == 0
        weights.write_bytes(b"after")
        with pytest.raises(ContractError, match="model_sample_sha256"):
            evaluate.main(words(folder, url, output))
        shutil.move(tmp_path / "models", tmp_path / "elsewhere")
        assert evaluate.main(words(folder, url, output)) == 0


def test_tables_and_sampling(folder: Path, tmp_path: Path) -> None:
    """MMBench's embedded images; top_p is sent only if set."""
    image = base64.b64encode((folder / "images" / "plain.png").read_bytes()).decode()
    (tmp_path / "bench.tsv").write_text(
        f"index\tquestion\thint\tA\tB\timage\n3\tWhich?\tnan\tred\tblue\t{image}\n"
    )
    more = (
        "--question-file",
        f"{tmp_path}/bench.tsv",
        "--all-rounds",
        "--temperature",
        "0.5",
        "--top-p",
        "0.9",
    )
    state = ChatServer(["tiny"])
    with serving(state) as url:
        assert evaluate.main(words(folder, url, tmp_path / "a.jsonl", *more)) == 0
    assert {(body["temperature"], body["top_p"]) for body in state.bodies} == {
        (0.5, 0.9)
    }
    seen = Image.open(folder / "images" / "plain.png")
    assert [row["text"] for row in read(tmp_path / "a.jsonl")] == [
        sees(f"Which?\nA. {a}\nB. {b}", seen)
        for a, b in (("red", "blue"), ("blue", "red"))
    ]


@pytest.mark.parametrize(
    "failure, message",
    [
        (
            status(429, "slow down", Retry_After="0"),
            "HTTP 429: slow down; retrying in 0",
        ),
        (status(503), "HTTP 503"),
        (close, "closed connection without response"),
        (raw(b'{"choices": []}'), "an answer without choices[0].message.content"),
        (stall, "no answer within 1.5 s (--timeout)"),
    ],
)
def test_what_may_pass_is_retried(folder, tmp_path, capsys, failure, message) -> None:
    state = ChatServer(["tiny"])
    state.failures = [failure] * 2
    limit = ("--timeout", "1.5") if "--timeout" in message else ()
    with serving(state) as url:
        assert evaluate.main(words(folder, url, tmp_path / "a.jsonl", *limit)) == 0
    assert message in capsys.readouterr().err
    check(folder, tmp_path / "a.jsonl")
    # a slow machine
    assert len(state.bodies) == 12 + 2 or (limit and len(state.bodies) > 12 + 2)


def test_a_server_that_dies_loses_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "answers.jsonl"
    state = ChatServer(["tiny"])
    state.dies_after = 5
    with serving(state) as url:
        assert (
            main(
                [
                    "llava",
                    "evaluate",
                    *words(folder, url, output, "--retries", "1", "--concurrency", "2"),
                ]
            )
            == 1
        )
    said = capsys.readouterr()
    assert "5 of 12 answers" in said.out
    assert "7 questions without an answer; rerun to ask them again" in said.err
    assert not output.exists()
    with pytest.raises(
        ConnectionError, match=r"refused; start the server, or correct --endpoint"
    ):
        evaluate.main(words(folder, url, output))  # it is still gone
    again = ChatServer(["tiny"])
    with serving(again) as other:
        assert other != url
        assert evaluate.main(words(folder, other, output)) == 0
        assert len(again.bodies) == 7
        assert (
            f"asking 'tiny' at {other}: 7 questions, 5 answered before"
            in capsys.readouterr().err
        )
        check(folder, output)
        assert {row["metadata"]["endpoint"] for row in read(output)} == {url, other}
        assert evaluate.main(words(folder, other, output)) == 0  # complete
    assert len(again.bodies) == 7
    with (
        serving(ChatServer(["other"])) as url,
        pytest.raises(ContractError, match=r"served_model 'tiny' -> 'other'"),
    ):
        evaluate.main(words(folder, url, output))


def test_questions_that_a_server_refuses(folder, tmp_path, capsys, monkeypatch) -> None:
    """One is named, the others are answered; if all are refused, the run stops early."""
    output = tmp_path / "answers.jsonl"
    state = ChatServer(["tiny"])
    state.refuses = "in 7?"
    with serving(state) as url:
        assert evaluate.main(words(folder, url, output)) == 1
        printed = capsys.readouterr()
        assert "11 of 12 answers\n" in printed.out
        assert "question 'q7': HTTP 400: cannot read in 7?" in printed.err
        state.refuses = ""
        assert evaluate.main(words(folder, url, output)) == 0
        assert len(state.bodies) == 12 + 1
        check(folder, output)
        state.refuses = "?"
        monkeypatch.setattr(served, "MOST_REFUSED", 3)
        with pytest.raises(
            ConnectionError,
            match=r"no answer to 3 requests in a row, last question 'q\d': HTTP 400",
        ):
            evaluate.main(
                words(folder, url, tmp_path / "b.jsonl", "--concurrency", "1")
            )


def test_one_model_of_several_is_named(folder, tmp_path) -> None:
    message = (
        r"serves 2 models; choose one with --served-model-name: llava-7b, llava-13b"
    )
    with (
        serving(ChatServer(["llava-7b", "llava-13b"])) as url,
        pytest.raises(ConnectionError, match=message),
    ):
        evaluate.main(words(folder, url, tmp_path / "a.jsonl"))
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_does_not_pass_stops_the_run(folder, tmp_path) -> None:
    state = ChatServer(["tiny"])
    state.failures = [status(404, "no such route")] * 12
    message = r"HTTP 404: no such route.*--endpoint.*0 of 12 answers are kept"
    with serving(state) as url, pytest.raises(ConnectionError, match=message):
        evaluate.main(words(folder, url, tmp_path / "a.jsonl", "--concurrency", "1"))
    assert len(state.bodies) == 1


def test_the_key_comes_from_the_environment(folder, tmp_path, monkeypatch) -> None:
    output = tmp_path / "answers.jsonl"
    with serving(ChatServer(["tiny"], key="sk-secret")) as url:
        with pytest.raises(
            ConnectionError,
            match=r"denies access \(HTTP 401: wrong key\); set OPENAI_API_KEY",
        ):
            evaluate.main(words(folder, url, output))
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\nsk-other")
        with pytest.raises(
            ValueError, match="OPENAI_API_KEY has characters that no API key has"
        ):
            evaluate.main(words(folder, url, output))
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
        assert evaluate.main(words(folder, url, output)) == 0
    check(folder, output)
    assert not any(
        "sk-secret" in path.read_text() for path in tmp_path.rglob("*.json*")
    )


def test_a_served_model_is_scored(tmp_path: Path) -> None:
    """bench-mllm asks the server and writes a score file that names it."""
    root = tmp_path / "eval"
    rows = [
        json.loads(line)
        for line in (GOLDEN / "pope" / "llava_pope_test.jsonl").read_text().splitlines()
    ]
    (root / "pope" / "val2014").mkdir(parents=True)
    shutil.copytree(GOLDEN / "pope" / "coco", root / "pope" / "coco")
    (root / "pope" / "llava_pope_test.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    for row in rows:
        Image.new("RGB", (4, 3)).save(root / "pope" / "val2014" / row["image"])
    with serving(ChatServer(["tiny"])) as url:
        assert (
            bench.main(
                [
                    str(root),
                    "--endpoint",
                    url,
                    "--output",
                    f"{tmp_path}/out",
                    "--benchmarks",
                    "pope",
                ]
            )
            == 0
        )
    record = ScoreFile.read(tmp_path / "out" / "scores" / "pope.scores.json")
    assert record.model == "tiny"
    assert len(record.items) == len(rows)
    settings = record.provenance["answer_settings"]
    assert (settings["endpoint"], settings["served_model"]) == (url, "tiny")
    assert "checkpoint" not in record.provenance
