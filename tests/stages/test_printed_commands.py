"""Commands that messages and documentation show: they run as printed, and their options exist."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from text_helpers import write_moved
from tiny_data import make_tower
from tiny_llm import save_tiny_llm

from llm2clip_plugin.cli import COMMANDS, OPTIONS
from llm2clip_plugin.cli import main as cli
from llm2clip_plugin.stages.tower_config import TRAIN_TOWER
from llm2clip_plugin.stages.tower_run import open_data
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.family import DualConfig
from llm2clip_plugin.vision.towers import load_tower

ROOT = Path(__file__).parents[2]
COLOURS = ("red", "green", "blue", "white")


def write_pairs(path: Path, images: Path) -> Path:
    """Four images in a folder of their own, and a .jsonl that names them; captions under a field of another name."""
    from PIL import Image

    images.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for colour in COLOURS:
        Image.new("RGB", (20, 20), colour).save(images / f"{colour}.png")
        rows.append({"id": colour, "image": f"{colour}.png", "says": f"it is {colour} in {path.stem}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An LLM, an adapter with its own settings, and a tower that names them, in a folder that a shell would split."""
    folder = tmp_path_factory.mktemp("a place") / "it's 1 & 2"
    save_tiny_llm(folder / "llm", "llama")
    write_moved(folder / "llm", folder / "adapter", prompt="Describe: ", chat_template="user")
    teacher = CaptionEncoder(EncoderConfig(llm=str(folder / "llm"), adapter=str(folder / "adapter")), "cpu").identity()
    torch.manual_seed(0)
    start = make_tower(folder / "start-tower")
    dual = DualEncoder(load_tower(start), DualConfig(projection_dim=16, llm_width=teacher.width, adapter_blocks=1))
    export_tower(dual, folder / "tower", origin=str(start), teacher=dataclasses.asdict(teacher))
    return folder


def command_in(message: str) -> list[str]:
    """The words of the command that a message ends with."""
    found = re.search(r"llm2clip (.+)", message)
    assert found, message
    return shlex.split(found[1])


def test_evaluate_and_training_say_how_to_create_the_cache(place, tmp_path, capsys):
    data = write_pairs(tmp_path / "some data" / "pairs.jsonl", tmp_path / "images")
    held_out = write_pairs(tmp_path / "held out" / "pairs.jsonl", tmp_path / "images")
    read = ["--image-folder", str(tmp_path / "images"), "--fields", "says=short"]
    words = ["evaluate", str(place / "tower"), str(data), "--resamples", "0", *read]
    assert cli(words) == 2
    assert cli([*command_in(capsys.readouterr().err), *read]) == 0 and cli(words) == 0, capsys.readouterr().err
    words = [str(data), "--tower", str(place / "start-tower"), "--validation", str(held_out), *read]
    with pytest.raises(FileNotFoundError) as caught:
        open_data(TRAIN_TOWER.parse(words))
    assert cli([*command_in(str(caught.value)), *read]) == 0, (
        capsys.readouterr().err
    )  # with the training data's teacher
    assert open_data(TRAIN_TOWER.parse(words)).validation_cache is not None


def known_options(name: str) -> set[str]:
    """The options that the help of a command lists."""
    module, attribute = OPTIONS[name]
    command = getattr(importlib.import_module(module), attribute)
    return {f"--{option}" for option in (*command.options.values(), *command.extras, "help", "help-all")}


def shown_commands() -> list[tuple[str, str]]:
    """(where, command line) in documentation and in the texts of the code; lines that end in a backslash joined."""
    found = []
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        spans = [*re.findall(r"`([^`\n]+)`", text), *text.split("\n")]
        found += [(path.name, span) for span in spans]
    for path in (*ROOT.glob("llm2clip_plugin/**/*.py"), *ROOT.glob("llava_integration/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append((path.name, "".join(v.value if isinstance(v, ast.Constant) else "X" for v in node.values)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += [(path.name, line) for line in node.value.split("\n")]
    start = re.compile(r"(?:llm2clip|llm2clip_plugin\.cli) ((?:[a-z]+[a-z-]*)(?: [a-z]+)?)")
    return [(where, text[match.start() :]) for where, text in found if (match := start.search(text))]


def test_every_option_after_a_command_exists():
    """Also of names that --help does not show: documentation and messages use the names that it shows."""
    unknown, seen = [], 0
    for where, line in shown_commands():
        words = re.split(r"(?:llm2clip|llm2clip_plugin\.cli) ", line, maxsplit=1)[1].split()
        name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in COMMANDS), "")
        if not name:
            continue
        line = re.split(r"[`#|;)]| -- ", line, maxsplit=1)[0]
        for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*", line):
            seen += 1
            option = option.rstrip(".").replace("--no-", "--")
            known = known_options(name)
            if option not in known and not option.startswith("--vision_tower"):
                unknown.append(f"{where}: llm2clip {name} {option}")
    assert seen > 50 and not unknown, "\n".join(unknown)
