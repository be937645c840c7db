"""The text adapter of a release."""

import torch
from safetensors.torch import save_file

from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.vision.convert.importing import import_tower

from ..conftest import largest_difference, read
from .checkpoints import CHECKPOINT, TOLERANCE


def test_an_adapter_trained_with_the_llm_in_the_loop_takes_embeddings_as_they_are(tmp_path):
    state = {
        name.replace("text.text_adaptor.", "text.text_proj.text_adaptor."): value
        for name, value in read(CHECKPOINT, "checkpoint.safetensors").items()
    }
    save_file(state, tmp_path / "live.safetensors")
    card, report = import_tower(tmp_path / "live.safetensors", tmp_path / "tower")
    assert card.dual["normalise_input"] is False
    assert any("with the LLM in the loop" in line for line in report)
    golden, dual = read(CHECKPOINT), load_dual_encoder(tmp_path / "tower")
    embeddings = torch.nn.functional.normalize(golden["text_input"], dim=-1)
    with torch.no_grad():
        text, longer = dual.encode_text(embeddings), dual.encode_text(2 * embeddings)
    assert largest_difference(text, golden["text_embeddings_normalized"]) < TOLERANCE
    assert largest_difference(text, longer) > TOLERANCE
