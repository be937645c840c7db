"""Every step on fake tensors of device "cuda"; test_fake_gpu.py runs it in a process that loaded fake_gpu.cpp.

A CPU tensor that meets a GPU's on the way is an error here, as on a GPU. DeepSpeed's engine does not run on fake
tensors: the step runs on our engine with torch's own optimizer in its place, as under ZeRO-0, on one rank.
Writes outcome.json into the folder: the name of each run, and "" or its error.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tiny_llm import save_tiny_llm
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import CLIPVisionConfig, Dinov2Config, SiglipVisionConfig

from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.data.samples import Caption
from llm2clip_plugin.evaluate.retrieval import retrieve
from llm2clip_plugin.stages.llm.config import FinetuneConfig
from llm2clip_plugin.stages.llm.run import trained_module
from llm2clip_plugin.text.config import ContrastConfig, EncoderConfig, LoraSettings
from llm2clip_plugin.text.contrast import CaptionStep, caption_terms
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.pairs import Pair
from llm2clip_plugin.train import heads
from llm2clip_plugin.train.checkpoint import HostCopies
from llm2clip_plugin.train.config import LossConfig, OptimConfig, TowerConfig
from llm2clip_plugin.train.engine import Engine
from llm2clip_plugin.train.losses.base import weighted_terms
from llm2clip_plugin.train.model import shape_dual
from llm2clip_plugin.train.reference import MovingAverage
from llm2clip_plugin.train.step import TowerStep
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.family import DualConfig

GPU = torch.device("cuda", 0)
WIDTH, ROWS = 24, 8
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = ImageConfig(size=28)
TOWERS = {
    "clip": CLIPVisionConfig(**TOWER, image_size=28, patch_size=14),
    "siglip": SiglipVisionConfig(**TOWER, image_size=28, patch_size=14),
    "dinov2": Dinov2Config(**TOWER, image_size=28, patch_size=14),
}
ARCHITECTURES = ("eva02-b16",)  # rotary embeddings, computed in each forward pass
PAIRS = [("two dogs", "dogs on wet grass"), ("a boat", "a boat on the lake"), ("a cat", "x"), ("a man", "he reads")]


class FakeGpu(FakeTensorMode):
    """Fake tensors have no values: a value that Python asks for is 1 or True, all elements of a mask are set, all
    tensors that are compared are equal, and all labels are distinct."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: bool, torch.int64: int}.get(args[0].dtype, float)(1)
        if func is torch.ops.aten.equal.default:
            return True
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_zeros((args[0].numel(), args[0].ndim), dtype=torch.int64)
        if func is torch.ops.aten.bincount.default:
            return args[0].new_zeros(max(args[0].numel(), (kwargs or {}).get("minlength", 0)))
        if func is torch.ops.aten.repeat_interleave.Tensor:
            return torch.zeros_like(args[0])
        if func is torch.ops.aten._unique2.default:
            flat = args[0].flatten()
            return flat, torch.zeros_like(args[0], dtype=torch.int64), torch.ones_like(flat, dtype=torch.int64)
        return super().dispatch(func, types, args, kwargs)


class TorchEngine(Engine):
    """Our engine without DeepSpeed's under it: forward, backward, and torch's fused AdamW."""

    def __init__(self, module: nn.Module, accumulation: int) -> None:
        self.module, self.stage, self.device = module, 0, GPU
        self.accumulation, self._clip, self._local_norm, self._calls = accumulation, 1.0, None, 0
        self.trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.frozen, self.keep_frozen, self._constants = [], False, {}
        self.optimizer = OptimConfig().optimizer()
        self.adamw = torch.optim.AdamW([p for _, p in self.trained], fused=True)
        self.device_engine = SimpleNamespace(
            backward=lambda loss: (loss / accumulation).backward(),
            step=self._step,
            is_gradient_accumulation_boundary=lambda: self._calls % accumulation == accumulation - 1,
            optimizer=self.adamw,
        )

    def __call__(self, *inputs: Tensor | None) -> Any:
        return self.module(*inputs)

    def _step(self) -> None:
        if self.device_engine.is_gradient_accumulation_boundary():
            self.adamw.step()
            self.adamw.zero_grad()
        self._calls += 1


def shaped(config: Any, folder: Path, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> DualEncoder:
    """A dual encoder without weights; ``config``: of a tower, or the name of an architecture."""
    tower = TowerConfig(architecture=config) if isinstance(config, str) else TowerConfig(path=str(folder / "tower"))
    if not isinstance(config, str):
        config.save_pretrained(folder / "tower")
    settings = DualConfig(llm_width=WIDTH, projection_dim=16, input_noise=0.1, logit_bias_init=-10.0 if bias else None)
    return shape_dual(tower, settings).to(dtype)


def tower_batch(model: DualEncoder) -> dict[str, Any]:
    """A batch as the loader gives it: on the CPU."""
    size = model.tower.config.image_size
    return {
        "pixels": torch.zeros(ROWS, size, size, 3, dtype=torch.uint8),
        "embeddings": torch.randn(ROWS, WIDTH),
        "caption_hashes": torch.arange(ROWS),
        "image_ids": torch.arange(ROWS),
        "keys": [str(row) for row in range(ROWS)],
        "position": ROWS,
    }


def tower(folder: Path, config: Any = TOWERS["clip"], kind: str = "infonce", micro: int = 1, **more: Any) -> None:
    """A step with clamp, and the moving average after it."""
    model = shaped(config, folder, bias=kind == "sigmoid", **more)
    with FakeGpu():
        engine = TorchEngine(model.to_empty(device=GPU), micro)
        average = MovingAverage(engine, 0.9)
        terms, normalize = weighted_terms(LossConfig(terms=(kind,))), Normalize(IMAGES, GPU)
        step = TowerStep(engine, terms, seed=0, text_noise=True, normalize=normalize)
        step(tower_batch(model))
        average.update()
        assert all(value.device.type == "cpu" for value in average.values(HostCopies()).values())
        assert all(value.device.type == "cpu" for value in engine.weights(HostCopies()).values())
        assert all(parameter.device == GPU for parameter in model.parameters())


def caption_encoder(folder: Path) -> CaptionEncoder:
    """An encoder that was loaded on the CPU and puts its batches on the GPU, where its weights are to follow."""
    encoder = CaptionEncoder(EncoderConfig(llm=str(folder / "llm"), compute_dtype="bfloat16"), "cpu")
    encoder.device = GPU
    return encoder


def stage1(folder: Path, *, micro: int = 1, negatives: bool = True, mask_same: bool = True) -> None:
    """A step of the LLM, and its evaluation."""
    encoder = caption_encoder(folder)
    config = FinetuneConfig(
        encoder=encoder.config,
        contrast=ContrastConfig(learn_scale=True, length_groups=2, mask_same=mask_same),
        lora=LoraSettings(r=2),
    )
    module = trained_module(encoder, config)
    pairs = [Pair(str(i), *texts, negative="a brick wall" if negatives else "") for i, texts in enumerate(PAIRS)]
    with FakeGpu():
        engine = TorchEngine(module.to_empty(device=GPU), micro)
        step = CaptionStep(engine, caption_terms(config.contrast), encoder, config.contrast, seed=0)
        step(
            {
                "pairs": pairs,
                "keys": [pair.key for pair in pairs],
                "caption_hashes": torch.arange(2 * len(pairs)).view(2, -1),
                "image_ids": torch.arange(len(pairs)),
                "position": len(pairs),
            }
        )


def embed(folder: Path) -> None:
    """Captions to embeddings."""
    encoder = caption_encoder(folder)
    with FakeGpu():
        encoder.model.to_empty(device=GPU)
        assert encoder.encode(["two dogs", "a boat on the lake"]).device.type == "cpu"


def evaluation(folder: Path) -> None:
    """Features of both sides on the GPU, and ranks over them."""
    model = shaped(TOWERS["clip"], folder).eval()
    with FakeGpu(), torch.no_grad():
        batch = tower_batch(model.to_empty(device=GPU))
        image_BD = model.encode_image(Normalize(IMAGES, GPU)(batch["pixels"]))
        text_BD = model.encode_text(batch["embeddings"].to(GPU))
        labels = torch.arange(ROWS)
        retrieve(image_BD, text_BD, labels, labels)


def fit_heads(folder: Path) -> None:
    """Heads on features that lie in the host's memory."""
    model = shaped(TOWERS["clip"], folder)
    with FakeGpu():
        features = heads.FrozenFeatures(
            pooled_IP=torch.randn(ROWS, 32),
            embedding_MW=torch.randn(2 * ROWS, WIDTH),
            caption_hashes_M=torch.arange(2 * ROWS),
            first_I=2 * torch.arange(ROWS),
            count_I=torch.full((ROWS,), 2),
            share_M=torch.full((2 * ROWS,), 0.5, dtype=torch.float64),
        )
        products = torch.autocast("cuda", torch.bfloat16)
        batch = tower_batch(model.to_empty(device=GPU))
        captions = [Caption(text="a boat", kind="short", language="en")] * ROWS
        batch |= {"captions": captions, "owners": torch.arange(ROWS)}
        with products:
            assert heads._encode(model, batch, Normalize(IMAGES, GPU), {})[0].device.type == "cpu"
        batches = heads.ImageBatches(model, features, 4, 0, products, GPU)
        heads._fit(model, batches, heads.HeadsConfig(steps=2, batch=4), LossConfig(), GPU, 0, 1, None, None)


def stray(folder: Path) -> None:
    """The control: a loss whose mask was made on the CPU."""
    with FakeGpu():
        scores = torch.randn(4, 4, device=GPU)
        scores.masked_fill(torch.zeros(1, 1, dtype=torch.bool), 0.0)


RUNS: dict[str, Callable[[Path], None]] = {
    "tower": tower,
    "tower cached": lambda folder: tower(folder, micro=4),
    "tower sigmoid": lambda folder: tower(folder, kind="sigmoid"),
    "tower sigmoid cached": lambda folder: tower(folder, kind="sigmoid", micro=2),
    "tower bf16": lambda folder: tower(folder, dtype=torch.bfloat16),
    **{f"tower {name}": lambda folder, name=name: tower(folder, TOWERS[name]) for name in ("siglip", "dinov2")},
    **{f"tower {name}": lambda folder, name=name: tower(folder, name) for name in ARCHITECTURES},
    "stage 1": lambda folder: stage1(folder, negatives=False),
    "stage 1 hard negatives": stage1,
    "stage 1 cached": lambda folder: stage1(folder, micro=2),
    "stage 1 without masks": lambda folder: stage1(folder, mask_same=False),
    "embed": embed,
    "evaluation": evaluation,
    "heads": fit_heads,
    "stray": stray,
}


# torch.autocast asks CUDA itself, which these tell nothing of the fake one
torch.cuda.amp.common.amp_definitely_not_available = lambda: False
torch.cuda.is_bf16_supported = lambda including_emulation=True: True


def main(folder: Path) -> dict[str, str]:
    save_tiny_llm(folder / "llm", "llama")
    outcome = {}
    for name, run in RUNS.items():
        try:
            run(folder)
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()[-3000:]
    return outcome


if __name__ == "__main__":
    result = main(Path(sys.argv[1]))
    Path(sys.argv[1], "outcome.json").write_text(json.dumps(result))
