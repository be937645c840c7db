"""Recognize the layout of a checkpoint and parse it.

| checkpoint                                        | recognized by                         | layouts/            |
|---------------------------------------------------|---------------------------------------|---------------------|
| LLM2CLIP-EVA02-*.pt, EVA-CLIP, timm's EVA02       | visual.blocks.*, visual.trunk.*.fc1_g | eva_clip.py         |
| OpenCLIP CLIP                                     | visual.transformer.resblocks.*        | open_clip.py        |
| OpenCLIP SigLIP                                   | visual.trunk.attn_pool.*              | open_clip_siglip.py |
| OpenCLIP, other towers of timm (PE)               | visual.trunk.*                        | open_clip_timm.py   |
| OpenVision                                        | no visual.ln_pre                      | openvision.py       |
| timm's own, on the Hub                            | config.json with an architecture      | timm_hub.py         |
| HF model, LLM2CLIP-Openai-*, LLM2CLIP-*-siglip2-* | config.json with a known model_type   | hub.py              |
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.vision.convert.checkpoint_files import read_tensors, weight_files
from llm2clip_plugin.vision.convert.layouts import hub, layouts, timm_hub
from llm2clip_plugin.vision.convert.parsed import OWN_TEXT, ParsedCheckpoint
from llm2clip_plugin.vision.convert.source_config import config_in, lift_model_cfg, merge, preprocessor_in, section


def parse_checkpoint(path: Path, given: dict[str, Any] | None) -> ParsedCheckpoint:
    """Parse a checkpoint file or folder.

    ``given``: the JSON object of --config. Its keys override those of the configuration file in the folder; if it has
    a ``model_type``, it describes a complete model and replaces that file.
    Raises ValueError (unknown layout or architecture), ContractError (a missing, misshapen or unknown tensor).
    """
    state: dict[str, Tensor] = {}
    for file in [path] if path.is_file() else weight_files(path):
        state |= read_tensors(file)
    given = lift_model_cfg(given or {})
    config = given if "model_type" in given else merge(lift_model_cfg(config_in(path, state)), given)
    layout = next((layout for layout in layouts().values() if layout.matches(state)), None)
    if layout is not None:
        parsed = layout.parse(state, config, given)
    elif "model_type" in config:
        parsed = hub.parse(state, config)
    elif "architecture" in config:
        parsed = timm_hub.parse(state, config)
    else:
        raise ValueError(
            f"{path}: the tensor names ({', '.join(sorted(state)[:3])}, ...) match none of the known layouts "
            f"{', '.join(layouts())}; a Hugging Face model needs its config.json, in the same folder or as --config"
        )
    parsed.preprocessor = preprocessor_in(path, config)
    _check_text_side(parsed, given)
    parsed.check_complete(where=str(path))
    return parsed


def _check_text_side(parsed: ParsedCheckpoint, given: dict[str, Any]) -> None:
    """ContractError for an incomplete text side, unless --config (``given``) states that the release has no logit scale
    (``logit_scale_init_value``) or no bias after the adapter (``text_cfg.proj_bias``)."""
    start, adapter = given.get("logit_scale_init_value"), parsed.adapter
    if parsed.logit_scale is None and (adapter is not None or OWN_TEXT in parsed.left_out.values()):
        if not isinstance(start, int | float):
            raise ContractError(
                "the checkpoint is missing logit_scale; if it never had one, set the initial value: --config with "
                '{"logit_scale_init_value": 2.6592} (a natural logarithm; CLIP starts at 2.6592)'
            )
        parsed.logit_scale = torch.tensor(float(start))
    if adapter is None:
        return
    last = adapter.names["projection.weight"]
    is_reference = last.split(".")[-3] in ("text_adaptor", "adaptor")  # the reference's adapter has a bias
    if is_reference and "projection.bias" not in adapter.names and section(given, "text_cfg").get("proj_bias", True):
        raise ContractError(
            f"the checkpoint is missing {last.replace('weight', 'bias')}; if it never had one, pass --config with "
            '{"text_cfg": {"proj_bias": false}}'
        )
