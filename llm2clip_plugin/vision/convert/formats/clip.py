"""A CLIP tower and its projection as transformers' CLIPVisionModelWithProjection."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llm2clip_plugin.console import quiet_transformers
from llm2clip_plugin.vision.convert.exporting import Format, projected_dual
from llm2clip_plugin.vision.directory import PREPROCESSOR_FILE, WEIGHTS_FILE, read_json, write_json
from llm2clip_plugin.vision.export import compare_features, probe_images, save_tower


def write(model: nn.Module, directory: Path, preprocessor: dict[str, Any]) -> None:
    """config.json, model.safetensors, preprocessor_config.json."""
    from safetensors.torch import load_file, save_file
    from transformers import CLIPVisionModelWithProjection

    dual = projected_dual(model, FORMAT.name, ("clip",))
    save_tower(dual.tower, directory)
    state = load_file(directory / WEIGHTS_FILE) | {"visual_projection.weight": dual.visual_projection.weight.detach()}
    save_file(state, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    fields = {"projection_dim": dual.config.projection_dim, "architectures": ["CLIPVisionModelWithProjection"]}
    write_json(directory / "config.json", read_json(directory / "config.json") | fields)
    write_json(directory / PREPROCESSOR_FILE, preprocessor)
    with quiet_transformers():
        reloaded: Any = CLIPVisionModelWithProjection.from_pretrained(directory, torch_dtype=dual.tower.dtype).eval()
    pixels = probe_images(dual.tower)
    with torch.no_grad():
        features = F.normalize(reloaded(pixel_values=pixels).image_embeds.float(), dim=-1)
        compare_features({"encode_image": dual.encode_image(pixels)}, {"encode_image": features}, where="format 'clip'")


FORMAT = Format(name="clip", help="transformers' CLIPVisionModelWithProjection", write=write)
