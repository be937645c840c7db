"""A tower directory in other people's formats, each read back and compared before it is said to be written.

| format   | writes                                                   | opens with                                     |
|----------|----------------------------------------------------------|------------------------------------------------|
| clip     | config.json, model.safetensors, preprocessor_config.json | CLIPVisionModelWithProjection                  |
| openclip | open_clip_model.safetensors, open_clip_config.json       | CLIP, SigLIP: OpenCLIP's image tower           |
|          |                                                          | EVA02: EVA-CLIP's image tower                  |
|          |                                                          | all: `llm2clip import`                         |
| onnx     | image_encoder.onnx, preprocessor_config.json             | ONNX Runtime                                   |

OpenCLIP's ``create_model`` opens none of them: it wants a text tower, whose place the LLM has taken.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2clip_plugin.contracts import TowerCard, whole_directory
from llm2clip_plugin.vision.convert.eva_names import eva_state
from llm2clip_plugin.vision.convert.open_clip_names import SIGLIP_HEADS, open_clip_siglip_state, open_clip_state
from llm2clip_plugin.vision.dual import DualEncoder, load_dual
from llm2clip_plugin.vision.export import WEIGHTS_FILE, check_card, compare_features, probe_images, save_tower
from llm2clip_plugin.vision.family import tower_in
from llm2clip_plugin.vision.towers import PREPROCESSOR_FILE, family_of, fetch_directory, load_tower

ONNX_FILE = "image_encoder.onnx"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_ONE_FILE = 1 << 30  # bytes of weights; protobuf ends at 2 GiB, larger ones lie beside the graph
SIGLIP_IN_TIMM = {768: "vit_base", 1024: "vit_large", 1152: "vit_so400m", 1536: "vit_giantopt"}  # by width
ADAPTER_NAMES = {"norm.": "ln.", "up.": "fn.0.", "down.": "fn.3."}  # ours -> the reference's, within a block


def convert(
    source: str | os.PathLike[str], output: str | os.PathLike[str], format_name: str, *, replace: bool = False
) -> Path:
    """Write the tower directory ``source`` to ``output`` in another format; returns the directory.

    Raises ValueError for an unknown format or one that cannot hold this tower, ContractError if what was written
    does not give the same features.
    """
    if format_name not in FORMATS:
        raise ValueError(f"unknown format {format_name!r}; known: tower, {', '.join(FORMATS)}")
    directory = fetch_directory(source)
    card = check_card(directory)
    model = load_dual(directory)[0] if card.projection_dim else load_tower(directory)
    preprocessor = (directory / PREPROCESSOR_FILE).read_text(encoding="utf-8")
    with whole_directory(output, replace=replace) as aside:
        FORMATS[format_name](model.eval(), aside, json.loads(preprocessor))
    return Path(output)


def _dual_of(model: nn.Module, format_name: str, families: tuple[str, ...]) -> DualEncoder:
    """The dual encoder, if the format can hold it; ValueError says why not."""
    if not isinstance(model, DualEncoder):
        raise ValueError(f"format {format_name!r} holds a tower with its projection; this directory has a tower alone")
    family, config = family_of(model.tower).name, model.config
    if family not in families:
        raise ValueError(f"format {format_name!r} holds {', '.join(families)} towers, this is a {family}")
    # pooled and cls are the same but for SigLIP, whose own models have no projection
    pools, projections = (("pooled",), ("linear", "none")) if family == "siglip" else (("pooled", "cls"), ("linear",))
    if config.pool not in pools or config.projection not in projections or config.projection_norm:
        raise ValueError(
            f"format {format_name!r} projects the family's pooled token by one matrix; this has pool {config.pool!r}, "
            f"projection {config.projection!r}, projection_norm {config.projection_norm}"
        )
    return model


def write_clip(model: nn.Module, directory: Path, preprocessor: dict[str, Any]) -> None:
    """CLIPVisionModelWithProjection: a CLIP tower and its projection under the hub's names."""
    from safetensors.torch import load_file, save_file
    from transformers import CLIPVisionModelWithProjection

    dual = _dual_of(model, "clip", ("clip",))
    if dual.config.projection_bias:
        raise ValueError("format 'clip' has a projection without bias, this tower's has one")
    save_tower(dual.tower, directory)
    state = load_file(directory / WEIGHTS_FILE)
    state["visual_projection.weight"] = dual.visual_projection.weight.detach()
    save_file(state, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config |= {"projection_dim": dual.config.projection_dim, "architectures": ["CLIPVisionModelWithProjection"]}
    _write_json(directory / "config.json", config)
    _write_json(directory / PREPROCESSOR_FILE, preprocessor)
    again: Any = CLIPVisionModelWithProjection.from_pretrained(directory, torch_dtype=dual.tower.dtype).eval()
    pixels = probe_images(dual.tower)
    with torch.no_grad():
        found = F.normalize(again(pixel_values=pixels).image_embeds.float(), dim=-1)
        compare_features({"encode_image": dual.encode_image(pixels)}, {"encode_image": found}, where="format 'clip'")


def write_open_clip(model: nn.Module, directory: Path, preprocessor: dict[str, Any]) -> None:
    """OpenCLIP's layout for a CLIP or SigLIP tower, EVA-CLIP's for an EVA one; adapter at ``text.text_adaptor``."""
    from safetensors.torch import save_file

    dual = _dual_of(model, "openclip", ("clip", "eva02", "siglip"))
    state = _open_clip_visual(dual, directory)
    state |= reference_adapter_state(dual)
    state["logit_scale"] = dual.logit_scale.reshape(())
    if dual.logit_bias is not None:
        state["logit_bias"] = dual.logit_bias.reshape(())
    tensors = {name: value.detach().clone().contiguous() for name, value in state.items()}
    save_file(tensors, directory / "open_clip_model.safetensors", metadata={"format": "pt"})
    chosen = {name: preprocessor[f"image_{name}"] for name in ("mean", "std")}
    fields = {"model_cfg": open_clip_fields(dual), "preprocess_cfg": chosen}
    _write_json(directory / "open_clip_config.json", fields)
    _check_by_import(dual, directory)


def _open_clip_visual(dual: DualEncoder, directory: Path) -> dict[str, Tensor]:
    """``visual.*`` of the tower and its projection; ``directory`` for files that are gone afterwards."""
    from safetensors.torch import load_file

    family, projection = family_of(dual.tower).name, dual.visual_projection
    if family == "eva02":
        state = eva_state(dual.tower.state_dict(), dual.tower.config)
        bias = torch.zeros(dual.config.projection_dim) if projection.bias is None else projection.bias
        return {**state, "visual.head.weight": projection.weight, "visual.head.bias": bias}
    if dual.config.projection_bias:
        raise ValueError(f"format 'openclip' has a projection without bias for {family} towers, this tower's has one")
    save_tower(dual.tower, directory)
    state = load_file(directory / WEIGHTS_FILE)
    for name in (WEIGHTS_FILE, "config.json"):
        (directory / name).unlink()
    matrix = projection.weight if dual.config.projection == "linear" else None
    return open_clip_siglip_state(state, matrix) if family == "siglip" else open_clip_state(state, matrix)


def open_clip_fields(dual: DualEncoder) -> dict[str, Any]:
    """OpenCLIP's (or EVA-CLIP's) model configuration of a dual encoder."""
    config, text = dual.tower.config, {}
    if dual.config.llm_width:
        text = {"use_embedding": True, "llm_embedding_dim": dual.config.llm_width}
    if family_of(dual.tower).name == "siglip":
        return {
            "embed_dim": dual.config.projection_dim,
            "vision_cfg": siglip_vision_fields(dual),
            "text_cfg": text,
            "quick_gelu": False,
        }
    vision: dict[str, Any] = {
        "image_size": config.image_size,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "head_width": config.hidden_size // config.num_attention_heads,
        "patch_size": config.patch_size,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
    }
    fields: dict[str, Any] = {"embed_dim": dual.config.projection_dim, "vision_cfg": vision, "text_cfg": text}
    if family_of(dual.tower).name == "clip":
        return {**fields, "quick_gelu": config.hidden_act == "quick_gelu"}
    vision["mlp_ratio"] = (config.intermediate_size + 0.5) / config.hidden_size  # truncated by readers: aim between
    vision |= {
        "qkv_bias": config.qkv_bias,
        "rope": config.rope,
        "pt_hw_seq_len": config.rope_pretrained_grid,
        "intp_freq": config.rope,
        "naiveswiglu": config.hidden_act == "swiglu",
        "subln": config.sub_norm,
        "postnorm": config.post_norm,
        "ls_init_value": 0.1 if config.layer_scale else None,
    }
    return fields


def siglip_vision_fields(dual: DualEncoder) -> dict[str, Any]:
    """OpenCLIP's ``vision_cfg`` of a SigLIP tower: a model of timm by name, where a released one has this width."""
    config = dual.tower.config
    fields = {
        "image_size": config.image_size,
        "timm_pool": "map",
        "timm_proj": "linear" if dual.config.projection == "linear" else "none",
    }
    if config.hidden_size in SIGLIP_IN_TIMM:
        name = SIGLIP_IN_TIMM[config.hidden_size]
        fields["timm_model_name"] = f"{name}_patch{config.patch_size}_siglip_{config.image_size}"
    if SIGLIP_HEADS.get(config.hidden_size) != config.num_attention_heads:
        fields["heads"] = config.num_attention_heads  # read by `llm2clip import` alone
    return fields


def reference_adapter_state(dual: DualEncoder) -> dict[str, Tensor]:
    """The text adapter under the names of LLM2CLIP's trainer; {} without one, ValueError if it has other parts."""
    config, adapter = dual.config, dual.text_adapter
    if adapter is None:
        return {}
    if config.adapter != "mlp" or not config.normalise_input or config.input_scale != "unit":
        raise ValueError(
            "format 'openclip' holds the paper's adapter (mlp on a unit-length input); this one is "
            f"{config.adapter!r} with normalise_input {config.normalise_input}, input_scale {config.input_scale!r}"
        )
    depth, found = config.adapter_blocks, {}
    for name, value in adapter.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "blocks":
            index, _, rest = rest.partition(".")
            for ours, theirs in ADAPTER_NAMES.items():
                if rest.startswith(ours):
                    found[f"text.text_adaptor.{index}.{theirs}{rest.removeprefix(ours)}"] = value
        else:
            found[f"text.text_adaptor.{depth if part == 'norm' else depth + 1}.{rest}"] = value
    return found


def _check_by_import(dual: DualEncoder, directory: Path) -> None:
    """What was written, imported again, gives the same features."""
    from llm2clip_plugin.vision.convert.importers import dual_of
    from llm2clip_plugin.vision.convert.layouts import parse

    again: Any = dual_of(parse(directory, None), source=str(directory), beside=directory)
    pixels = probe_images(dual.tower)
    expected, found = {"encode_image": dual.encode_image(pixels)}, {"encode_image": again.encode_image(pixels)}
    if dual.text_adapter is not None:
        embeddings = torch.randn(3, dual.config.llm_width, generator=torch.Generator().manual_seed(0))
        expected["encode_text"], found["encode_text"] = dual.encode_text(embeddings), again.encode_text(embeddings)
    compare_features(expected, found, where="format 'openclip'")


class _ImageEncoder(nn.Module):
    """Pixels to what an image encoder is asked for: joint features, or the pooled output of a tower alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        if isinstance(self.model, DualEncoder):
            return self.model.encode_image(pixel_values)
        return self.model(pixel_values=pixel_values).pooler_output


def write_onnx(model: nn.Module, directory: Path, preprocessor: dict[str, Any]) -> None:
    """The image encoder as ONNX, any batch size, checked by ONNX Runtime at two batch sizes."""
    if missing := [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"format 'onnx' needs {', '.join(missing)}: pip install {' '.join(missing)}")
    import onnxruntime

    encoder = _ImageEncoder(model).float().eval()
    tower = tower_in(model)
    pixels = probe_images(tower, count=3)
    size = sum(parameter.numel() * 4 for parameter in encoder.parameters())
    torch.onnx.export(
        encoder,
        (pixels[:2],),
        str(directory / ONNX_FILE),
        input_names=["pixel_values"],
        output_names=["image_features"],
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        external_data=size > ONNX_ONE_FILE,
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(directory / ONNX_FILE), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        for batch in (pixels, pixels[:1]):
            found = torch.from_numpy(session.run(None, {"pixel_values": batch.numpy()})[0])
            expected = encoder(batch)
            compare_features({"image_features": expected}, {"image_features": found}, where="ONNX Runtime")
    _write_json(directory / PREPROCESSOR_FILE, preprocessor)


def _write_json(path: Path, body: dict[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=2, sort_keys=True) + "\n", encoding="utf-8")


FORMATS: dict[str, Callable[[nn.Module, Path, dict[str, Any]], None]] = {
    "clip": write_clip,
    "openclip": write_open_clip,
    "onnx": write_onnx,
}


def push_to_hub(directory: str | os.PathLike[str], repository: str, *, private: bool = True) -> str:
    """Upload a tower directory, its model card with it, to the Hub as ``owner/name``; returns the commit's address.

    The weights are compared with the card first. Raises ContractError if they differ, OSError if the Hub refuses.
    """
    from huggingface_hub import HfApi

    place = Path(directory)
    card: TowerCard = check_card(place)
    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    message = f"LLM2CLIP {card.family} tower, {card.image_size} px, sha256 {card.weights_sha256[:12]}"
    return str(api.upload_folder(repo_id=repository, folder_path=place, commit_message=message).commit_url)
