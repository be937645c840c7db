"""Arguments that are something else than a command takes: one line names the thing; nothing is
written or lost."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from faults import Fault, World, contents, copied, meet, rows
from PIL import Image
from tiny_llm import save_tiny_llm

from llm2clip_plugin.cli import main
from llm2clip_plugin.contracts import ScoreFile

TABLE = (Path(__file__).parent / "wrong_arguments.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def furnished(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with one of everything: a run, an LLM and its adapter, pictures, tables, scores,
    questions."""
    world = copied(whole, tmp_path_factory.mktemp("furnished") / "w")
    assert main([*world.train("--output_dir {w}/run --max_steps 0")]) == 0
    save_tiny_llm(world.path("llm"), "llama")
    save_tiny_llm(world.path("gptq"), "llama")
    config = world.path("gptq") / "config.json"
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    config.write_text(json.dumps(json.loads(config.read_text()) | quantized))
    save_tiny_llm(world.path("mute"), "llama")
    for path in world.path("mute").glob("*token*"):
        path.unlink()
    for folder in ("pictures", "packed", "tables"):
        world.path(folder).mkdir()
    for number in range(3):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(
            world.path("pictures") / f"{number}.png"
        )
    (world.path("packed") / "00000.tar.gz").write_bytes(b"\x1f\x8b" + bytes(99))
    (world.path("tables") / "captions.csv").write_text("image,caption\na.png,a bird\n")
    lines = [
        json.dumps({"id": f"é{i}", "image": "0.png", "caption": f"a bird {i}"}, ensure_ascii=False)
        for i in range(3)
    ]
    text = {
        "array": f"[{','.join(lines)}]",
        "commas": ",\n".join(lines) + ",\n",
        "lines": "\n".join(lines),
    }
    for name, body in text.items():
        world.path(f"{name}.jsonl").write_text(body)
    world.path("utf16.jsonl").write_text(text["lines"], encoding="utf-16")
    world.path("latin1.jsonl").write_text(text["lines"], encoding="latin-1")
    world.path("questions.jsonl").write_text(
        '{"question_id": 1, "image": "0.png", "text": "What?"}\n'
    )
    world.path("notes.json").write_text('{"a": 1}')
    ScoreFile(benchmark="pope", metrics={"f1": 0.5}, items=[{"id": 1, "score": 1}]).write(
        world.path("one.scores.json")
    )
    return world


@rows(*(Fault(*line.split(" | ")) for line in TABLE if not line.startswith("#")))
def test_refused(
    fault: Fault,
    furnished: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(furnished.folder)
    started = time.monotonic()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("LLM2CLIP_HOME", str(tmp_path / "home"))
    told = meet(fault, furnished, fault.words.replace("{w}", str(furnished.folder)).split(), capsys)
    assert told.count("error: ") == 1 and time.monotonic() < started + 10
    assert contents(furnished.folder) == before and not [*(tmp_path / "here").iterdir()]
