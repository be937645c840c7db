"""Damaged checkpoints at ``llava export``: one line each, and nothing is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from serve_checkpoints import base_model, full, lora, tower_directory
from torch import Tensor

from llm2clip_plugin.cli import main as llm2clip

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
ADAPTER = "adapter_config.json"
LORA = "adapter_model.safetensors"
Damage = Callable[[Path], object]


def settings(file: str = CONFIG, **changes: object) -> Damage:
    """Other values of a JSON file; None deletes."""

    def damage(folder: Path) -> None:
        body = {**json.loads((folder / file).read_text()), **changes}
        (folder / file).write_text(
            json.dumps({key: value for key, value in body.items() if value is not None})
        )

    return damage


def weights(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], file: str = WEIGHTS
) -> Damage:
    """Other tensors of a file."""
    return lambda folder: save_file(
        change(load_file(folder / file)), folder / file, {"format": "pt"}
    )


def user_defined(piece: str, **changes: object) -> Damage:
    """A piece that sentencepiece takes whole, in a tokenizer that such pieces are not exported
    of."""

    def damage(folder: Path) -> None:
        from transformers.convert_slow_tokenizer import import_protobuf

        proto: Any = import_protobuf().ModelProto()
        proto.ParseFromString((folder / "tokenizer.model").read_bytes())
        proto.pieces[-1].piece = piece
        proto.pieces[-1].type = 4
        (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
        settings("tokenizer_config.json", **changes)(folder)

    return damage


def tensor(end: str, value: Tensor) -> Damage:
    """Another value of the tensors whose names end so."""
    return weights(
        lambda state: {
            name: value.clone() if name.endswith(end) else old
            for name, old in state.items()
        }
    )


def nan(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() * torch.nan for name, value in state.items()}


TENSORS: dict[str, tuple[Damage, str]] = {
    "nan": (
        tensor("0.self_attn.q_proj.weight", torch.full((32, 32), torch.nan)),
        "q_proj.weight is nan",
    ),
    "int8": (
        tensor("0.self_attn.q_proj.weight", torch.zeros(32, 32, dtype=torch.int8)),
        "quantized checkpoints",
    ),
}
SETTINGS: dict[str, tuple[Damage, str]] = {
    "far layer": (settings(mm_vision_select_layer=-40), "mm_vision_select_layer -40"),
    "quantized": (
        settings(quantization_config={"quant_method": "bitsandbytes"}),
        "quantization_config is",
    ),
    "more layers": (
        settings(num_hidden_layers=3),
        "tensors are missing, such as model.layers.2",
    ),
    "width": (
        settings(mm_hidden_size=48),
        "expects features of width 48, but the tower",
    ),
    "projector": (
        settings(mm_projector_type="linear"),
        "mm_projector_type is 'linear'",
    ),
    "foreign": (settings(model_type="qwen2_vl"), "model_type is 'qwen2_vl'"),
    "next": (settings(image_aspect_ratio="anyres"), "image_aspect_ratio is 'anyres'"),
    # LLaVA's loader then adds one
    "patch token": (settings(mm_use_im_patch_token=None), "mm_use_im_patch_token"),
    "pieces, not legacy": (
        user_defined("zz▁qq", legacy=False),
        "user-defined pieces such as 'zz▁qq', which are exported with \"legacy\": true",
    ),
    "pieces, normalized": (
        user_defined("z  q"),
        "changes the user-defined piece 'z  q' to 'z▁q'",
    ),
}
ADAPTERS: dict[str, tuple[Damage, str]] = {
    "no projector": (
        lambda folder: (folder / "non_lora_trainables.bin").unlink(),
        "no non_lora_trainables.bin",
    ),
    "cut": (
        lambda folder: (folder / LORA).write_bytes((folder / LORA).read_bytes()[:-9]),
        "not a complete",
    ),
    "block lost": (
        weights(lambda s: {n: v for n, v in s.items() if "s.1." not in n}, LORA),
        "3 target_modules",
    ),
    "nan": (weights(nan, LORA), "up_proj.weight is nan"),
    "another rank": (settings(ADAPTER, r=8), "rank 4, expected"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind that nothing is wrong with."""
    root = tmp_path_factory.mktemp("whole")
    clip = tower_directory("clip")
    checkpoint = full(root / "llava-full", clip)
    return {
        "full": checkpoint,
        "lora": lora(root / "llava-lora", clip, base_model(root / "vicuna")),
    }


def cases(damages: dict[str, tuple[Damage, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("damage, said", damages.values(), ids=damages)


def check(
    source: Path,
    folder: Path,
    damage: Damage,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Damage a copy and export it."""
    copy = shutil.copytree(source, folder / source.name)
    out = folder / "out" / "llava-out"
    damage(copy)
    assert (
        llm2clip(["llava", "export", str(copy), "--no-compare", "--output", str(out)])
        == 2
    )
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ")
    assert said in message
    assert "\n" not in message
    assert not out.parent.exists() or not [*out.parent.iterdir()]


@cases(TENSORS | SETTINGS)
def test_a_full_checkpoint(whole, tmp_path, capsys, damage, said):
    check(whole["full"], tmp_path, damage, said, capsys)


@cases(ADAPTERS)
def test_a_lora(whole, tmp_path, capsys, damage, said):
    check(whole["lora"], tmp_path, damage, said, capsys)
