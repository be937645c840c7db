"""A full disk: one error that names the file, the disk and what to do; nothing is half written,
earlier outputs are intact, and the same command completes once there is space."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_server import ChatServer, serving
from planted_faults import Fault, World, contents, copied, meet, rows
from small_disk import FILLER, fill, mounted
from tiny_llm import save_tiny_llm

from llm2clip_plugin.cli import main
from llm2clip_plugin.contracts import CacheManifest, ScoreFile

POPE = Path(__file__).parents[1] / "golden" / "mllm" / "pope"
NO_SPACE = (
    "cannot write {w}/disk/%s: No space left on device (0.0... "
    "MB free); ...rerun the same command"
)
RERUN = "cache/"  # what a rerun of the same command completes


@pytest.fixture(scope="module")
def made(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """What the commands read: data, a tower, an LLM, a finished run."""
    world = copied(whole, tmp_path_factory.mktemp("made") / "w")
    save_tiny_llm(world.path("llm"), "llama")
    assert main(world.train()) == 0
    return world


@pytest.fixture
def small(made: World) -> Iterator[World]:
    """The world, with a disk of 512 kB that has earlier outputs."""
    with mounted(made.path("disk"), "512k") as disk:
        (disk / "tower").mkdir(exist_ok=True)
        for name in ("config.json", "llm2clip.json"):
            (disk / "tower" / name).write_text("of an earlier command")
        ScoreFile(benchmark="pope", metrics={}, items=[]).write(
            disk / "pope.scores.json"
        )
        yield made
    made.path("disk").rmdir()


def outputs(disk: Path) -> dict[str, bytes]:
    """What no rerun completes."""
    files = contents(disk)
    assert not [name for name in files if name.endswith(".tmp")]
    return {
        name: body
        for name, body in files.items()
        if name != FILLER and not name.startswith(RERUN)
    }


def full(name: str, command: str, file: str, leave: int = 12288) -> Fault:
    """``file``: that cannot be written to the disk, which has ``leave`` bytes left."""
    return Fault(
        name, command, NO_SPACE % file, lambda w: fill(w.path("disk"), leave=leave)
    )


SCORE = (
    f"score pope {POPE} --answers {POPE}/answers/model-a.jsonl "
    f"--output {{w}}/disk/pope.scores.json"
)
EMBED = "embed {w}/data --llm {w}/llm --cache {w}/disk/cache"


@rows(
    full("embed", EMBED, "cache/00000.safetensors"),
    full("embed, without space for the manifest", EMBED, "cache/manifest.json", 0),
    full("import", "import {w}/tower --output {w}/disk/tower --overwrite", "tower"),
    full(
        "import, to a new folder",
        "import {w}/tower --output {w}/disk/new/tower",
        "new/tower",
        0,
    ),
    full("export", "export {w}/new --output {w}/disk/tower --overwrite", "tower"),
    full("score", SCORE, "pope...", 0),
    full(
        "data split, on a full disk",
        "data split {w}/data --output {w}/disk/split --validation 0.2",
        "split",
        0,
    ),
)
def test_written_whole_or_not_at_all(
    fault: Fault, small: World, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small.path("disk")
    command = fault.words.replace("{w}", str(small.folder)).split()
    before = outputs(disk)
    assert meet(fault, small, command, capsys).count("error: ") == 1
    assert outputs(disk) == before
    for manifest in disk.glob("cache/manifest.json"):
        assert not CacheManifest.read(manifest).complete
    (disk / FILLER).unlink()
    assert main(command) == 0
    for manifest in disk.glob("cache/manifest.json"):
        assert CacheManifest.read(manifest).complete
    assert outputs(disk) != before or "cache" in fault.words


def test_answers_until_the_disk_was_full_are_kept(
    small: World, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small.path("disk")
    questions = small.path("questions.jsonl")
    output = small.path("disk/answers.jsonl")
    rows = [
        {"question_id": number, "text": f"What is {number}?"} for number in range(60)
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    server = ChatServer(["tiny"])
    with serving(server) as url:
        command = [
            "llava",
            "evaluate",
            "--endpoint",
            url,
            "--question-file",
            str(questions),
        ]
        command += ["--answers-file", str(output), "--concurrency", "1"]
        before = outputs(disk)
        fault = full("", "", "answers.jsonl", 3 * 4096)
        assert meet(fault, small, command, capsys).count("error: ") == 1
        assert {
            name for name in outputs(disk) if not name.startswith("answers.jsonl.")
        } == {*before}
        (disk / FILLER).unlink()
        server.bodies.clear()
        assert main(command) == 0
    assert 0 < len(server.bodies) < len(rows)
    assert [
        json.loads(line)["question_id"] for line in output.read_text().splitlines()
    ] == [*range(60)]
