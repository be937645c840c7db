"""A CLIP's own text tower as the encoder of a cache, against its own library."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clip import save_tiny_clip
from tiny_llm import tiny_tokenizer
from torch._dynamo.utils import counters

from llm2clip_plugin.text.clip_text import ClipTextEncoder, clip_folder
from llm2clip_plugin.text.config import EncoderConfig

TEXTS = [
    "a red bird",
    "seven grey stones in the rain, and a very long sentence that goes on",
    "blue",
    "a red bird",
]


def encoder(folder: Path, **options: Any) -> ClipTextEncoder:
    clip = clip_folder(str(folder))
    assert clip is not None
    return ClipTextEncoder(
        clip, EncoderConfig(llm=str(folder), compute_dtype="float32", **options), "cpu"
    )


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_features_of_hugging_face_models_are_theirs(
    tmp_path: Path, kind: str, graphs: list[int]
):
    """Each caption alone, as the model's own processor tokenizes it, and compiled; fp32 with
    padding: 1e-5."""
    model = save_tiny_clip(tmp_path / kind, kind)
    ours = encoder(tmp_path / kind)
    features = ours.encode(TEXTS)
    tokenizer = tiny_tokenizer(eos=True)
    for text, feature in zip(TEXTS, features, strict=True):
        padding = "max_length" if kind == "siglip" else False
        ids = tokenizer(
            [text], truncation=True, max_length=20, padding=padding, return_tensors="pt"
        )["input_ids"]
        if ids.shape[1] == 20 and kind == "clip":
            ids[0, -1] = tokenizer.eos_token_id  # as CLIPTokenizer truncates
        with torch.no_grad():
            output = model.get_text_features(input_ids=ids)
        expected = output if isinstance(output, torch.Tensor) else output.pooler_output
        torch.testing.assert_close(feature, expected[0], atol=1e-5, rtol=1e-4)
    ours.compile()
    torch.testing.assert_close(ours.encode(TEXTS), features, atol=1e-5, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert ours.width == features.shape[1] == (24 if kind == "clip" else 32)
    assert ours.identity().fingerprint != ours.identity().weights_sha256
    assert ours.count_truncated == 2
    assert (features[0] - features[2]).norm() > 0.1
    # transformers would make a tokenizer that knows no word
    (tmp_path / kind / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer; copy"):
        encoder(tmp_path / kind)
