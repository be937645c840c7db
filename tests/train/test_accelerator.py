"""The same numbers on a GPU (scripts/check_gpu.sh) as on a CPU in float64; without a GPU, on a CPU
in float32."""

import copy
from pathlib import Path

import pytest
import torch
from tiny_clip import TINY
from tiny_llm import save_tiny_llm
from transformers import CLIPVisionConfig, CLIPVisionModel

from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.train.distributed import choose_device
from llm2clip_plugin.train.losses.infonce import contrastive_loss
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder

pytestmark = pytest.mark.gpu


def test_pixels_loss_and_gradients_are_those_of_float64() -> None:
    torch.manual_seed(0)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            image_size=32, patch_size=16, attn_implementation="sdpa", **TINY
        )
    )
    dual = DualEncoder(tower, DualConfig(projection_dim=16, llm_width=24))
    pixels = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    embeddings = torch.randn(6, 24)

    def run(
        device: torch.device, dtype: torch.dtype
    ) -> tuple[float, list[torch.Tensor]]:
        module = copy.deepcopy(dual).to(device, dtype)
        image, text, log_scale, *_ = module(
            Normalize(ImageConfig(size=32), device)(pixels).to(dtype),
            embeddings.to(device, dtype),
        )
        loss = contrastive_loss(
            image, text, log_scale.exp(), caption_hashes=None, image_ids=None
        )
        loss.backward()
        gradients = [
            p.grad.double().cpu() for p in module.parameters() if p.grad is not None
        ]
        return float(loss.detach()), gradients

    loss, gradients = run(choose_device(), torch.float32)
    expected, expected_gradients = run(torch.device("cpu"), torch.float64)
    assert loss == pytest.approx(expected, abs=1e-5)
    assert len(gradients) == len(expected_gradients) > 20
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-4, rtol=1e-3)


def test_caption_embeddings_are_those_of_the_cpu(tmp_path: Path) -> None:
    llm = save_tiny_llm(tmp_path / "llm", "llama")
    captions = [
        "a red bicycle",
        "two dogs run over the wet grass, and a cat sleeps in a box",
    ]
    encoder = CaptionEncoder(
        EncoderConfig(llm=str(llm), compute_dtype="float32", attention="causal")
    )
    assert encoder.device.type == choose_device().type
    model = encoder.model.llm
    reference = copy.deepcopy(model).to("cpu", torch.float64)
    expected = []
    for tokens in encoder.tokenize(captions):
        states = reference(torch.tensor([tokens]), use_cache=False).last_hidden_state
        expected.append(states[0].mean(0))
    embedded = torch.as_tensor(encoder.encode(captions)).double().cpu()
    torch.testing.assert_close(
        embedded, torch.stack(expected).detach(), atol=1e-4, rtol=1e-3
    )
