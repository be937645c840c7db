"""OpenCLIP's checkpoint of a CLIP or SigLIP tower, EVA-CLIP's of an EVA02 one, with the adapter where LLM2CLIP has it.

OpenCLIP's and EVA-CLIP's image towers load it, and `llm2clip import`. OpenCLIP's ``create_model`` does not: it needs a
text tower, which the LLM has replaced.
"""

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llm2clip_plugin.vision.convert.exporting import Format, projected_dual
from llm2clip_plugin.vision.convert.importing import build_model, parse_checkpoint
from llm2clip_plugin.vision.convert.layouts import layouts
from llm2clip_plugin.vision.directory import WEIGHTS_FILE, write_json
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.export import compare_features, probe_features, save_tower
from llm2clip_plugin.vision.families import family_of

IN_ADAPTER_BLOCK = {"norm": "ln", "up": "fn.0", "down": "fn.3"}  # ours -> LLM2CLIP's trainer


def write(model: nn.Module, directory: Path, preprocessor: dict[str, Any]) -> None:
    """open_clip_model.safetensors and open_clip_config.json, verified by importing them."""
    from safetensors.torch import load_file, save_file

    layout_of = {layout.family: layout for layout in layouts().values() if layout.family}
    dual = projected_dual(model, FORMAT.name, tuple(layout_of))
    layout = layout_of[family_of(dual.tower).name]
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        save_tower(dual.tower, Path(folder))
        tower_file = load_file(Path(folder) / WEIGHTS_FILE)
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


FORMAT = Format(
    name="openclip",
    help="OpenCLIP's tensor names (CLIP, SigLIP) or EVA-CLIP's (EVA02) with the LLM's adapter, for their image towers "
    "and `llm2clip import`; OpenCLIP's create_model needs a text tower and does not load it",
    write=write,
)
