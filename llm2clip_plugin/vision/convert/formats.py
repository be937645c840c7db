"""Convert a tower directory to another library's format; each reloads what it wrote and compares
the features."""

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2clip_plugin.folders import CONVERTED_FOLDER, output_folder
from llm2clip_plugin.quiet import quiet_transformers
from llm2clip_plugin.safetensors_header import load_tensors
from llm2clip_plugin.vision import export
from llm2clip_plugin.vision.directory import (
    PREPROCESSOR_FILE,
    WEIGHTS_FILE,
    fetch_directory,
    read_json,
    write_json,
)
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.families import family_of
from llm2clip_plugin.vision.parts import tower_in
from llm2clip_plugin.vision.towers import preprocessor_config

ONNX_FILE = "image_encoder.onnx"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# bytes of weights; protobuf is limited to 2 GiB, larger weights are written to a separate file
LARGEST_ONNX = 1 << 30


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    format_name: str,
    *,
    replace: bool = False,
) -> Path:
    """Write the tower directory ``source`` to ``output`` in another format; returns the directory.
    Raises ValueError if the format cannot represent the tower, ContractError if the files give
    other features."""
    directory = fetch_directory(source)
    model = export.load_model(directory)
    write = {"clip": write_clip, "onnx": write_onnx}[format_name]
    with output_folder(output, CONVERTED_FOLDER, replace=replace) as temporary:
        write(model.eval(), temporary, preprocessor_config(directory, square=True))
    return Path(output)


def write_clip(dual: nn.Module, directory: Path, preprocessor: dict[str, Any]) -> None:
    """A CLIP tower with a single projection matrix, as a CLIPVisionModelWithProjection."""
    from transformers import CLIPVisionModelWithProjection

    if not isinstance(dual, DualEncoder) or family_of(dual.tower).name != "clip":
        raise ValueError(
            "format 'clip' is for a CLIP tower with a projection; --format onnx converts every "
            "tower"
        )
    chosen = {
        name: getattr(dual.config, name)
        for name in ("pool", "projection", "projection_norm", "projection_bias")
    }
    pool, *projection = chosen.values()
    if pool not in ("pooled", "cls") or projection != ["linear", False, False]:
        raise ValueError(
            f"format 'clip' cannot represent a tower with {chosen}; --format onnx can"
        )
    export.save_tower(dual.tower, directory)
    heads = {"visual_projection.weight": dual.visual_projection.weight}
    export.save_tensors(
        load_tensors(directory / WEIGHTS_FILE) | heads, directory / WEIGHTS_FILE
    )
    fields = {
        "projection_dim": dual.config.projection_dim,
        "architectures": ["CLIPVisionModelWithProjection"],
    }
    write_json(directory / "config.json", read_json(directory / "config.json") | fields)
    write_json(directory / PREPROCESSOR_FILE, preprocessor)
    with quiet_transformers():
        reloaded: Any = CLIPVisionModelWithProjection.from_pretrained(
            directory, torch_dtype=dual.tower.dtype
        ).eval()
    pixels = export.probe_images(dual.tower)
    with torch.no_grad():
        features = F.normalize(
            reloaded(pixel_values=pixels).image_embeds.float(), dim=-1
        )
        export.compare_features(
            {"image": dual.encode_image(pixels)},
            {"image": features},
            where="format 'clip'",
        )


class _ImageEncoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        if isinstance(self.model, DualEncoder):
            return self.model.encode_image(pixel_values)
        return self.model(pixel_values).pooler_output


def write_onnx(model: nn.Module, directory: Path, preprocessor: dict[str, Any]) -> None:
    """The image encoder for ONNX Runtime, for any batch size: image features, or the pooled output
    of a tower alone."""
    if missing := [
        name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None
    ]:
        raise ValueError(
            f"format 'onnx' requires {', '.join(missing)}: pip install {' '.join(missing)}"
        )
    import onnxruntime

    encoder = _ImageEncoder(model).float().eval()
    pixels = export.probe_images(tower_in(model), count=3)
    size = sum(parameter.numel() * 4 for parameter in encoder.parameters())
    with warnings.catch_warnings():  # of a renamed class of torch's own
        warnings.filterwarnings(
            "ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning
        )
        torch.onnx.export(
            encoder,
            (pixels[:2],),
            str(directory / ONNX_FILE),
            input_names=["pixel_values"],
            output_names=["image_features"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            external_data=size > LARGEST_ONNX,
            dynamo=True,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(
        str(directory / ONNX_FILE), providers=["CPUExecutionProvider"]
    )
    with torch.no_grad():
        for batch in (pixels, pixels[:1]):
            features = torch.from_numpy(
                session.run(None, {"pixel_values": batch.numpy()})[0]
            )
            export.compare_features(
                {"image": encoder(batch)}, {"image": features}, where="ONNX Runtime"
            )
    write_json(directory / PREPROCESSOR_FILE, preprocessor)
