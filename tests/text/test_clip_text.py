"""A CLIP's own text tower as the encoder of a cache, against its own library: Hugging Face's and OpenCLIP's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_clip import save_tiny_clip
from tiny_llm import tiny_tokenizer

from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.teacher import ClipTextEncoder, clip_folder

TEXTS = ["a red bird", "seven grey stones in the rain, and a very long sentence that goes on", "blue", "a red bird"]


def save_open_clip(folder: Path, *, nested: bool) -> Any:
    """A random OpenCLIP model in the Hub's format; its tokenizer is another's."""
    import open_clip

    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    kind = open_clip.CustomTextCLIP if nested else open_clip.CLIP
    model = kind(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=not nested)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    tiny_tokenizer(eos=True).save_pretrained(folder)
    save_file({n: v.contiguous() for n, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, "quick_gelu": not nested}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return model.eval()


def encoder(folder: Path, **options: Any) -> ClipTextEncoder:
    found = clip_folder(str(folder))
    assert found is not None
    return ClipTextEncoder(found, EncoderConfig(llm=str(folder), compute_dtype="float32", **options), "cpu")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_features_of_hugging_face_models_are_theirs(tmp_path: Path, kind: str):
    """Each caption alone, as the model's own processor tokenizes it; fp32 with padding: 1e-5."""
    model = save_tiny_clip(tmp_path / kind, kind)
    ours = encoder(tmp_path / kind)
    features = ours.encode(TEXTS)
    tokenizer = tiny_tokenizer(eos=True)
    for text, feature in zip(TEXTS, features, strict=True):
        padding = "max_length" if kind == "siglip" else False
        ids = tokenizer([text], truncation=True, max_length=20, padding=padding, return_tensors="pt")["input_ids"]
        if ids.shape[1] == 20 and kind == "clip":
            ids[0, -1] = tokenizer.eos_token_id  # as CLIPTokenizer truncates
        with torch.no_grad():
            output = model.get_text_features(input_ids=ids)
        expected = output if isinstance(output, torch.Tensor) else output.pooler_output
        torch.testing.assert_close(feature, expected[0], atol=1e-5, rtol=1e-4)
    assert ours.width == features.shape[1] == (24 if kind == "clip" else 32)
    assert ours.identity().fingerprint != ours.identity().weights_sha256 and ours.count_truncated == 1
    assert (features[0] - features[2]).norm() > 0.1


@pytest.mark.parametrize("nested", [False, True])
def test_features_of_open_clip_are_open_clips(tmp_path: Path, nested: bool):
    import open_clip

    model = save_open_clip(tmp_path / "open", nested=nested)
    ours = encoder(tmp_path / "open")
    ids = open_clip.tokenize(TEXTS)
    with torch.no_grad():
        expected = model.encode_text(ids)
    found = ours.embed_tokens([row[row > 0].tolist() for row in ids])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (expected[0] - expected[2]).norm() > 0.1 and ours.width == 24
