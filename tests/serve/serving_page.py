"""The code of docs/serving.md, and a folder with what it names."""

import json
import re
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from serve_checkpoints import full, tower_directory

from llava_integration.serve.export import Export, export

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(
    r"^```python\n(.*?)^```",
    (ROOT / "docs" / "serving.md").read_text(encoding="utf-8"),
    re.M | re.S,
)
COLORS = {"red": (220, 30, 30), "blue": (40, 60, 230)}


def block_with(text: str) -> str:
    """The page's Python with ``text`` in it."""
    (block,) = (block for block in BLOCKS if text in block)
    return block


def make_folder(folder: Path) -> None:
    """An exported model, images and a JSON of LLaVA's."""
    checkpoint = full(
        folder / "llava-tiny", tower_directory("clip"), llm2clip_conversation="v1"
    )
    export(Export.of(checkpoint, dtype="fp32"), folder / "hf" / "llava-7b")
    images = folder / "playground" / "data"
    images.mkdir(parents=True)
    rows = []
    for number, (name, color) in enumerate(COLORS.items()):
        Image.new("RGB", (30, 20 + number), color).save(images / f"{name}.png")
        words = ("<image>\nWhich color?", name, "Sure?", "yes")
        turns = [
            {"from": ("human", "gpt")[n % 2], "value": word}
            for n, word in enumerate(words)
        ]
        rows.append({"id": name, "image": f"{name}.png", "conversations": turns})
    rows.append(
        {
            "id": "text",
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
            ],
        }
    )
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))
    Image.new("RGB", (30, 20), COLORS["red"]).save(folder / "cat.png")


def check_trained() -> None:
    """In the current folder: the tower stays, the rest is trained, and servers know the saved
    names."""
    before, after = (
        load_file(f"hf/{name}/model.safetensors")
        for name in ("llava-7b", "llava-7b-tuned")
    )
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == name.startswith("vision_tower."), (
            name
        )
