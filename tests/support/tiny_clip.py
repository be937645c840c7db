"""A random image-text model of two blocks, 32 wide, with its own text tower and a tokenizer."""

from pathlib import Path
from typing import Any

import torch
from tiny_llm import tiny_tokenizer

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION = {**TINY, "image_size": 16, "patch_size": 8}


def save_tiny_clip(folder: Path, kind: str) -> Any:
    """A random image-text model with its tokenizer."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    torch.manual_seed(0)
    text = {
        **TINY,
        "vocab_size": 400,
        "max_position_embeddings": 20,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    if kind == "clip":
        model = CLIPModel(
            CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
        )
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    for parameter in model.parameters():  # so that features differ well
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tiny_tokenizer(eos=True).save_pretrained(folder)
    return model.eval()
