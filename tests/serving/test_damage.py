"""Damaged checkpoints at ``llava export``: one line each, and nothing is written."""

from __future__ import annotations

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

WEIGHTS, CONFIG, ADAPTER = "model.safetensors", "config.json", "adapter_config.json"
TOKENIZER, LORA = "tokenizer_config.json", "adapter_model.safetensors"
Damage = Callable[[Path], object]


def settings(file: str = CONFIG, **changes: object) -> Damage:
    """Other values of a JSON file; None deletes."""

    def damage(folder: Path) -> None:
        body = {**json.loads((folder / file).read_text()), **changes}
        (folder / file).write_text(json.dumps({key: value for key, value in body.items() if value is not None}))

    return damage


def weights(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], file: str = WEIGHTS) -> Damage:
    """Other tensors of a file."""
    return lambda folder: save_file(change(load_file(folder / file)), folder / file, {"format": "pt"})


def user_defined_symbol(folder: Path) -> None:
    """A piece that sentencepiece takes whole, as `user_defined_symbols` makes it."""
    from transformers.convert_slow_tokenizer import import_protobuf

    proto: Any = import_protobuf().ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    proto.pieces[-1].piece, proto.pieces[-1].type = "zz▁qq", 4
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())


def tensor(end: str, value: Tensor) -> Damage:
    """Another value of the tensors whose names end so."""
    return weights(lambda state: {name: value.clone() if name.endswith(end) else old for name, old in state.items()})


def written(file: str, text: str) -> Damage:
    return lambda folder: (folder / file).write_text(text)


def in_one_shard_of_two(folder: Path) -> None:
    """The index lists two shards, which have the same tensors."""
    state = load_file(folder / WEIGHTS)
    names = sorted(state)
    files = {name: f"model-0000{1 + (place >= 5)}-of-00002.safetensors" for place, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names[:5]}, folder / file, {"format": "pt"})
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / WEIGHTS).unlink()


def nan(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() * torch.nan for name, value in state.items()}


TENSORS: dict[str, tuple[Damage, str]] = {
    "empty": (written(WEIGHTS, ""), "is not a complete safetensors file"),
    "mixed shards": (in_one_shard_of_two, "tensors that no file has"),
    "index without map": (lambda folder: (written(f"{WEIGHTS}.index.json", "{}")(folder), (folder / WEIGHTS).unlink()),
                          '"weight_map"'),
    "nan": (tensor("0.self_attn.q_proj.weight", torch.full((32, 32), torch.nan)), "q_proj.weight is nan"),
    "int8": (tensor("0.self_attn.q_proj.weight", torch.zeros(32, 32, dtype=torch.int8)), "quantized checkpoints"),
    "float8": (tensor("norm.weight", torch.ones(32).to(torch.float8_e4m3fn)), "quantized checkpoints"),
    "block": (tensor("1.self_attn.k_proj.weight", torch.zeros(48, 32)), "k_proj.weight has shape (48, 32)"),
    "transposed": (tensor("1.mlp.down_proj.weight", torch.zeros(64, 32)), "config.json says (32, 64)"),
    "norm": (tensor("1.input_layernorm.weight", torch.zeros(48)), "1.input_layernorm.weight has shape (48,)"),
    "rows in one": (tensor("embed_tokens.weight", torch.zeros(600)), "embed_tokens.weight has shape"),
}  # fmt: skip
PROJECTOR: dict[str, tuple[Damage, str]] = {
    "projector's bias": (tensor("mm_projector.0.bias", torch.zeros(48)), "mm_projector.0.bias has shape (48,)"),
    "second bias": (tensor("mm_projector.2.bias", torch.zeros(48)), "mm_projector.2.bias has shape (48,)"),
    "projector's width": (tensor("mm_projector.0.weight", torch.zeros(32, 48)), "config.json says (32, 32)"),
}
SETTINGS: dict[str, tuple[Damage, str]] = {
    "no tower": (settings(mm_vision_tower=None), "there is no mm_vision_tower"),
    "no layer": (settings(mm_vision_select_layer=None), "mm_vision_select_layer is None, expected a hidden state"),
    "layer as text": (settings(mm_vision_select_layer="-2"), "mm_vision_select_layer is '-2'"),
    "far layer": (settings(mm_vision_select_layer=-40), "mm_vision_select_layer is -40"),
    "feature": (settings(mm_vision_select_feature="class"), "expected 'patch' or 'cls_patch'"),
    "quantized": (settings(quantization_config={"quant_method": "bitsandbytes"}), "is quantized (bitsandbytes)"),
    "heads": (settings(num_attention_heads=5), "q_proj.weight has shape (32, 32), config.json says (30, 32)"),
    "key heads": (settings(num_key_value_heads=3), "k_proj.weight has shape (32, 32), config.json says (24, 32)"),
    "float": (settings(num_hidden_layers=2.0), "num_hidden_layers is 2.0, expected a positive whole number"),
    "rope": (settings(rope_parameters=[1]), "rope_parameters is [1], expected an object"),
    "base": (settings(rope_theta="x"), "rope_theta is 'x', expected a number"),
    "tied": (settings(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes', expected true or false"),
    "added tokens": (settings(TOKENIZER, added_tokens_decoder=[1]), f"{TOKENIZER} cannot be used"),
    "tokenizer": (lambda folder: (folder / "tokenizer.model").unlink(), "no tokenizer.model in"),
    "symbols": (user_defined_symbol, "user-defined pieces that are no merges of others, such as 'zz▁qq'"),
}
ADAPTERS: dict[str, tuple[Damage, str]] = {
    "no projector": (lambda folder: (folder / "non_lora_trainables.bin").unlink(), "writes the projector of a LoRA"),
    "cut": (lambda folder: (folder / LORA).write_bytes((folder / LORA).read_bytes()[:-9]), "not a complete"),
    "empty": (weights(lambda _: {}, LORA), "6 of 6 target_modules of adapter_config.json have no LoRA"),
    "block lost": (weights(lambda s: {n: v for n, v in s.items() if "s.1." not in n}, LORA), "3 of 6 target_modules"),
    "flat": (weights(lambda s: {n: v.flatten() for n, v in s.items()}, LORA), "says r 4"),
    "int8": (weights(lambda s: {n: v.to(torch.int8) for n, v in s.items()}, LORA), "quantized checkpoints"),
    "nan": (weights(nan, LORA), "up_proj.weight is nan"),
    "no rank": (settings(ADAPTER, r=None), "r is None and lora_alpha 8, expected positive numbers"),
    "rank 0": (settings(ADAPTER, r=0), "r is 0"),
    "another rank": (settings(ADAPTER, r=8), "says r 8"),
    "no alpha": (settings(ADAPTER, lora_alpha=None), "lora_alpha None"),
    "list": (written(ADAPTER, "[]"), "contains a list, expected an object"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind that nothing is wrong with."""
    root, clip = tmp_path_factory.mktemp("whole"), tower_directory("clip")
    checkpoint = full(root / "llava-full", clip)
    return {"full": checkpoint, "lora": lora(root / "llava-lora", clip, base_model(root / "vicuna"))}


def cases(damages: dict[str, tuple[Damage, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("damage, said", damages.values(), ids=damages)


def check(source: Path, folder: Path, damage: Damage, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Damage a copy and export it."""
    copy, out = shutil.copytree(source, folder / source.name), folder / "out" / "llava-out"
    damage(copy)
    assert llm2clip(["llava", "export", str(copy), "--no-compare", "--output", str(out)]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and said in message and "\n" not in message
    assert not out.parent.exists() or not [*out.parent.iterdir()]


@cases(TENSORS | PROJECTOR | SETTINGS)
def test_a_full_checkpoint(whole, tmp_path, capsys, damage, said):
    check(whole["full"], tmp_path, damage, said, capsys)


@cases(ADAPTERS)
def test_a_lora(whole, tmp_path, capsys, damage, said):
    check(whole["lora"], tmp_path, damage, said, capsys)
