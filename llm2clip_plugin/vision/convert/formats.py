"""Convert a tower directory to another library's format; each reloads what it wrote and compares the features."""

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2clip_plugin.console import quiet_onnx, quiet_transformers
from llm2clip_plugin.contracts import TowerCard, atomic_directory
from llm2clip_plugin.files import load_tensors
from llm2clip_plugin.options import unknown
from llm2clip_plugin.vision.checkpoint import preprocessor_config
from llm2clip_plugin.vision.convert import FORMATS
from llm2clip_plugin.vision.convert.importing import build_model, parse_checkpoint
from llm2clip_plugin.vision.convert.layouts import layouts
from llm2clip_plugin.vision.directory import PREPROCESSOR_FILE, WEIGHTS_FILE, fetch_directory, read_json, write_json
from llm2clip_plugin.vision.dual import DualEncoder, load_dual
from llm2clip_plugin.vision.export import compare_features, probe_features, probe_images, save_tower
from llm2clip_plugin.vision.families import family_of
from llm2clip_plugin.vision.family import tower_in
from llm2clip_plugin.vision.towers import load_tower

ONNX_FILE = "image_encoder.onnx"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_ONNX = 1 << 30  # bytes of weights; protobuf is limited to 2 GiB, larger weights are written to a separate file
IN_ADAPTER_BLOCK = {"norm": "ln", "up": "fn.0", "down": "fn.3"}  # ours -> LLM2CLIP's trainer
OTHER = "--format onnx converts every tower, and the tower directory itself opens with transformers' AutoModel"


def convert(
    source: str | os.PathLike[str], output: str | os.PathLike[str], format_name: str, *, replace: bool = False
) -> Path:
    """Write the tower directory ``source`` to ``output`` in another format; returns the directory.

    Raises ValueError for an unknown format or one that cannot represent the tower, ContractError if the written files
    give other features.
    """
    if format_name not in FORMATS:
        raise ValueError(unknown("format", format_name, ["tower", *FORMATS]))
    directory = fetch_directory(source)
    card = TowerCard.read(directory / TowerCard.FILE)
    model = load_dual(directory)[0] if card.projection_dim else load_tower(directory)
    write = {"clip": write_clip, "onnx": write_onnx, "openclip": write_openclip}[format_name]
    with atomic_directory(output, replace=replace) as temporary:
        write(model.eval(), temporary, preprocessor_config(directory))
    return Path(output)


def write_clip(model: nn.Module, directory: Path, preprocessor: dict[str, Any]) -> None:
    """A CLIP tower and its projection as transformers' CLIPVisionModelWithProjection."""
    from safetensors.torch import save_file
    from transformers import CLIPVisionModelWithProjection

    dual = projected_dual(model, "clip", ("clip",))
    save_tower(dual.tower, directory)
    projection = {"visual_projection.weight": dual.visual_projection.weight.detach()}
    save_file(load_tensors(directory / WEIGHTS_FILE) | projection, directory / WEIGHTS_FILE, {"format": "pt"})
    fields = {"projection_dim": dual.config.projection_dim, "architectures": ["CLIPVisionModelWithProjection"]}
    write_json(directory / "config.json", read_json(directory / "config.json") | fields)
    write_json(directory / PREPROCESSOR_FILE, preprocessor)
    with quiet_transformers():
        reloaded: Any = CLIPVisionModelWithProjection.from_pretrained(directory, torch_dtype=dual.tower.dtype).eval()
    pixels = probe_images(dual.tower)
    with torch.no_grad():
        features = F.normalize(reloaded(pixel_values=pixels).image_embeds.float(), dim=-1)
        compare_features({"encode_image": dual.encode_image(pixels)}, {"encode_image": features}, where="format 'clip'")


def projected_dual(model: nn.Module, format_name: str, families: tuple[str, ...]) -> DualEncoder:
    """The dual encoder, if the format can represent it: a pooled token, then one matrix; else ValueError."""
    if not isinstance(model, DualEncoder):
        raise ValueError(f"format {format_name!r} requires a projection, but this directory has only a tower; {OTHER}")
    family, config = family_of(model.tower).name, model.config
    if family not in families:
        raise ValueError(f"format {format_name!r} supports {', '.join(families)} towers, not {family}; {OTHER}")
    # pooled and cls are the same except in SigLIP, whose own models have no projection
    pools, projections = (("pooled",), ("linear", "none")) if family == "siglip" else (("pooled", "cls"), ("linear",))
    chosen = {name: getattr(config, name) for name in ("pool", "projection", "projection_norm", "projection_bias")}
    fits = config.pool in pools and config.projection in projections and not config.projection_norm
    if not fits or (config.projection_bias and family != "eva02"):
        raise ValueError(f"format {format_name!r} cannot represent a {family} tower with {chosen}; {OTHER}")
    return model


class _ImageEncoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        if isinstance(self.model, DualEncoder):
            return self.model.encode_image(pixel_values)
        return self.model(pixel_values=pixel_values).pooler_output


def write_onnx(model: nn.Module, directory: Path, preprocessor: dict[str, Any]) -> None:
    """The image encoder for ONNX Runtime, for any batch size: image features, or the pooled output of a tower alone."""
    if missing := [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"format 'onnx' requires {', '.join(missing)}: pip install {' '.join(missing)}")
    import onnxruntime

    encoder = _ImageEncoder(model).float().eval()
    pixels = probe_images(tower_in(model), count=3)
    size = sum(parameter.numel() * 4 for parameter in encoder.parameters())
    with quiet_onnx():
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
    session = onnxruntime.InferenceSession(str(directory / ONNX_FILE), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        for batch in (pixels, pixels[:1]):
            features = torch.from_numpy(session.run(None, {"pixel_values": batch.numpy()})[0])
            compare_features({"image_features": encoder(batch)}, {"image_features": features}, where="ONNX Runtime")
    write_json(directory / PREPROCESSOR_FILE, preprocessor)


def write_openclip(model: nn.Module, directory: Path, preprocessor: dict[str, Any]) -> None:
    """OpenCLIP's checkpoint of a CLIP or SigLIP tower, EVA-CLIP's of an EVA02 one, with LLM2CLIP's adapter.

    OpenCLIP's and EVA-CLIP's image towers load it, and `llm2clip import`. OpenCLIP's ``create_model`` does not: it
    needs a text tower, which the LLM has replaced.
    """
    from safetensors.torch import save_file

    layout_of = {layout.family: layout for layout in layouts().values() if layout.family}
    dual = projected_dual(model, "openclip", tuple(layout_of))
    layout = layout_of[family_of(dual.tower).name]
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        save_tower(dual.tower, Path(folder))
        tower_file = load_tensors(Path(folder) / WEIGHTS_FILE)
    state = layout.visual_state(dual, tower_file) | adapter_state(dual)
    state["logit_scale"] = dual.logit_scale.reshape(())
    if dual.logit_bias is not None:
        state["logit_bias"] = dual.logit_bias.reshape(())
    tensors = {name: value.detach().clone().contiguous() for name, value in state.items()}
    save_file(tensors, directory / "open_clip_model.safetensors", metadata={"format": "pt"})
    width = dual.config.llm_width
    text = {"text_cfg": {"use_embedding": True, "llm_embedding_dim": width} if width else {}}
    chosen = {name: preprocessor[f"image_{name}"] for name in ("mean", "std")}
    fields = {"model_cfg": layout.model_config(dual) | text, "preprocess_cfg": chosen}
    write_json(directory / "open_clip_config.json", fields)
    reloaded = build_model(parse_checkpoint(directory, None), str(directory), temporary=directory)
    compare_features(probe_features(dual), probe_features(reloaded), where="format 'openclip'")


def adapter_state(dual: DualEncoder) -> dict[str, Tensor]:
    """The text adapter under the names of LLM2CLIP's trainer; {} without one, ValueError for another architecture."""
    config, adapter = dual.config, dual.text_adapter
    if adapter is None:
        return {}
    if config.adapter != "mlp" or not config.normalise_input or config.input_scale != "unit":
        raise ValueError(
            "format 'openclip' supports the paper's adapter (mlp, normalise_input, input_scale 'unit'); this one has "
            f"{config.adapter!r}, normalise_input {config.normalise_input}, input_scale {config.input_scale!r}"
        )
    state = {}
    for name, value in adapter.state_dict().items():
        *module, kind = name.split(".")  # blocks.0.norm.weight, norm.weight, projection.weight
        if module[0] == "blocks":
            place = f"{module[1]}.{IN_ADAPTER_BLOCK[module[2]]}"
        else:
            place = str(config.adapter_blocks + ["norm", "projection"].index(module[0]))
        state[f"text.text_adaptor.{place}.{kind}"] = value
    return state
