"""The world that faults are planted into."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from planted_faults import World, copied
from tiny_data import make_all
from tiny_llm import save_tiny_llm

from llm2clip_plugin.cli import main
from llm2clip_plugin.contracts import ScoreFile


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a fault; tests get copies."""
    return make_all(tmp_path_factory.mktemp("whole") / "w")


@pytest.fixture
def world(whole: Path, tmp_path: Path) -> World:
    return copied(whole, tmp_path / "w")


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
        json.dumps(
            {"id": f"é{i}", "image": "0.png", "caption": f"a bird {i}"},
            ensure_ascii=False,
        )
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
    ScoreFile(
        benchmark="pope", metrics={"f1": 0.5}, items=[{"id": 1, "score": 1}]
    ).write(world.path("one.scores.json"))
    return world
