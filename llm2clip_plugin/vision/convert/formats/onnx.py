"""The image encoder for ONNX Runtime: image features, or the pooled output of a tower alone."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip_plugin.console import quiet_onnx
from llm2clip_plugin.vision.convert.exporting import Format
from llm2clip_plugin.vision.directory import PREPROCESSOR_FILE, write_json
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.export import compare_features, probe_images
from llm2clip_plugin.vision.family import tower_in

FILE = "image_encoder.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_FILE = 1 << 30  # bytes of weights; protobuf is limited to 2 GiB, larger weights are written to a separate file


class _ImageEncoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        if isinstance(self.model, DualEncoder):
            return self.model.encode_image(pixel_values)
        return self.model(pixel_values=pixel_values).pooler_output


def write(model: nn.Module, directory: Path, preprocessor: dict[str, Any]) -> None:
    """image_encoder.onnx, for any batch size and compared with ONNX Runtime at two, and preprocessor_config.json."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"format 'onnx' requires {', '.join(missing)}: pip install {' '.join(missing)}")
    import onnxruntime

    encoder = _ImageEncoder(model).float().eval()
    pixels = probe_images(tower_in(model), count=3)
    size = sum(parameter.numel() * 4 for parameter in encoder.parameters())
    with quiet_onnx():
        torch.onnx.export(
            encoder,
            (pixels[:2],),
            str(directory / FILE),
            input_names=["pixel_values"],
            output_names=["image_features"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            external_data=size > LARGEST_FILE,
            dynamo=True,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(str(directory / FILE), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        for batch in (pixels, pixels[:1]):
            features = torch.from_numpy(session.run(None, {"pixel_values": batch.numpy()})[0])
            compare_features({"image_features": encoder(batch)}, {"image_features": features}, where="ONNX Runtime")
    write_json(directory / PREPROCESSOR_FILE, preprocessor)


FORMAT = Format(name="onnx", help="image encoder for ONNX Runtime", write=write)
