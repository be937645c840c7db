"""Memory that a dry run expects: against the closed form, against what autograd keeps, and against measured peaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llm2clip_plugin.stages.plan_text import GIB, columns
from llm2clip_plugin.train.memory import (
    Kept,
    Model,
    kept_by_adapter,
    kept_by_tower,
    kept_bytes,
    rank_bytes,
    tokens_of,
)
from llm2clip_plugin.train.optim import OptimConfig
from llm2clip_plugin.vision.dual import DualConfig, make_adapter
from llm2clip_plugin.vision.eva02 import Eva02Config, Eva02VisionModel
from llm2clip_plugin.vision.lora import add_lora
from llm2clip_plugin.vision.quick_gelu import use_quick_gelu
from llm2clip_plugin.vision.towers import freeze_tower, resize_tower

FAMILIES = ["clip", "clip as transformers has it", "clip gelu", "siglip", "dinov2", "eva02", "eva02 bigE"]


def tower(kind: str, *, size: int = 56, width: int = 64, blocks: int = 3, device: str = "meta"):
    """A small tower with hidden layers four (EVA02: 8/3) times as wide."""
    common = {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "image_size": size,
        "patch_size": 14,
    }
    wide = {**common, "intermediate_size": 4 * width}
    plain = {"hidden_act": "gelu", "sub_norm": False, "rope": False, "post_norm": True}
    with torch.device(device):
        if kind == "siglip":
            return SiglipVisionModel(SiglipVisionConfig(**wide)).train()
        if kind == "dinov2":
            return Dinov2Model(Dinov2Config(**common)).train()
        if kind == "eva02":
            return Eva02VisionModel(Eva02Config(**common, intermediate_size=width * 8 // 3)).train()
        if kind == "eva02 bigE":
            return Eva02VisionModel(Eva02Config(**wide, **plain)).train()
        act = "gelu" if kind == "clip gelu" else "quick_gelu"
        model = CLIPVisionModel(CLIPVisionConfig(**wide, hidden_act=act)).train()
        if kind == "clip":
            use_quick_gelu(model)
        return model


def closed_form(kind: str, width: int, size: int) -> float:
    """Bytes of a block a token, ``size`` bytes a value (Korthikanti et al. 2022, section 4.1, without dropout).

    Two norms' inputs, one of them the block's; q, k, v and the attention's output; inputs of its projections, of the
    MLP's two Linears and of the activation in between. Norms also keep mean and deviation, attention a sum a head.
    """
    hidden = {"eva02": width * 8 // 3}.get(kind, 4 * width)
    values = {
        "clip": 8 * width + 2 * hidden,
        "clip as transformers has it": 8 * width + 3 * hidden,  # x * sigmoid(1.702 x) keeps the sigmoid, too
        "clip gelu": 8 * width + 2 * hidden,
        "siglip": 8 * width + 2 * hidden,
        "dinov2": 10 * width + 2 * hidden,  # layer scale keeps both branches
        "eva02": 9 * width + 4 * hidden,  # a norm behind the attention; gate, up, product, normed product
        "eva02 bigE": 8 * width + 2 * hidden,  # norms keep the branches, the blocks' inputs go into Linears
    }[kind]
    norms = 4 if kind == "eva02" else 2
    return (values + 2 * norms) * size + 4 * 4  # 4 heads


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_block_keeps_what_the_closed_form_says(kind: str, precision: str):
    model = tower(kind)
    kept, size = kept_by_tower(model, precision), {"fp32": 4, "bf16": 2}[precision]
    assert kept.block == tokens_of(model) * closed_form(kind, 64, size)
    assert kept.blocks == 3 and kept.state == tokens_of(model) * 64 * size


@pytest.mark.parametrize("kind", ["clip", "dinov2", "eva02"])
def test_more_tokens_keep_more_in_proportion(kind: str):
    small, large = tower(kind), resize_tower(tower(kind, device="cpu"), 112)
    use_quick_gelu(large)  # resizing made a new tower
    scaled = kept_by_tower(small, "fp32").times(tokens_of(large) / tokens_of(small))
    counted = kept_by_tower(large.to("meta"), "fp32")
    assert (scaled.block, scaled.state, scaled.blocks) == (counted.block, counted.state, counted.blocks)
    assert scaled.rest == pytest.approx(counted.rest, rel=0.1)  # the class token has no pixels


def test_what_rests_keeps_less():
    whole, upper, lora, frozen = (tower("clip") for _ in range(4))
    freeze_tower(upper, first_blocks=2)
    freeze_tower(frozen)
    add_lora(lora, rank=2, alpha=4)
    full = kept_by_tower(whole, "fp32")
    assert kept_by_tower(upper, "fp32").blocks == 1 and kept_by_tower(upper, "fp32").block <= full.block
    assert kept_by_tower(lora, "fp32").blocks == 3
    nothing = kept_by_tower(frozen, "fp32")
    assert (nothing.block, nothing.blocks, nothing.rest) == (0, 0, 0)


@pytest.mark.parametrize("options", [{}, {"adapter": "linear"}, {"adapter_blocks": 2, "adapter_expansion": 3}])
def test_the_adapter_keeps_what_is_counted(options: dict):
    config = DualConfig(llm_width=96, projection_dim=40, **options)
    adapter, embeddings = make_adapter(config).train(), torch.randn(50, 96)
    counted = kept_bytes(adapter, lambda: adapter(embeddings))
    assert kept_by_adapter(config, "fp32") * 50 == pytest.approx(counted, rel=0.1)


MEASURE = """
import json, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from test_memory import tower

torch.set_num_threads(1)

def peak(reset=False):
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

found = {}
for kind in ("clip", "eva02"):
    for checkpointing in (False, True):
        model, pixels = tower(kind, size=140, width=128, blocks=4, device="cpu"), torch.randn(12, 3, 140, 140)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(pixel_values=pixels[:1]).pooler_output.square().mean().backward()  # the gradients themselves are there
        before = peak(reset=True)
        model(pixel_values=pixels).pooler_output.square().mean().backward()
        found[f"{kind} {checkpointing}"] = peak() - before
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_expected_activations_are_near_measured_peaks():
    """Growth of a process's memory in a forward and backward pass of 12 images, large tensors in pages of their own."""
    words = [sys.executable, "-W", "ignore", "-c", MEASURE, str(Path(__file__).parent)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    measured = json.loads(subprocess.run(words, check=True, capture_output=True, text=True, env=environment).stdout)
    for case, peak in measured.items():
        kind, checkpointing = case.split()
        kept = kept_by_tower(tower(kind, size=140, width=128, blocks=4), "fp32")
        assert 0.75 < peak / (12 * kept.peak(checkpointing=checkpointing == "True")) < 1.2, case


def model(**changes) -> Model:
    fields = {
        "precision": "bf16",
        "checkpointing": True,
        "trained": 1000,
        "frozen": 100,
        "kept": Kept(block=8, state=2, rest=4, blocks=10),
        "kept_text": 3,
        "projection_dim": 5,
        "pixels": 7,
    }
    return Model(**{**fields, **changes})


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "adamw"),
    [(0, 2200, 2000, 8000), (1, 2200, 2000, 1500), (2, 2200, 250, 1500), (3, 275, 250, 1500)],
)
def test_stages_of_zero(stage: int, weights: float, gradients: float, adamw: float):
    found = rank_bytes(model(), {"stage": stage}, world=8, global_batch=64, micro_batch=8)
    assert (found["weights"], found["gradients"], found["AdamW"]) == (weights, gradients, adamw)
    assert found["activations"] == 8 * (10 * 2 + 8 + 4 + 2 + 3) and found["images"] == 8 * 7 * 2
    cached = rank_bytes(model(), {"stage": stage}, world=8, global_batch=64, micro_batch=4)
    assert cached["gradients"] == 3 * gradients  # summed over micro-batches in fp32
    assert cached["activations"] == found["activations"] / 2


def test_the_optimizer_says_what_its_states_take():
    eight = OptimConfig(name="adamw_8bit").optimizer().state_bytes
    assert OptimConfig().optimizer().state_bytes == 8 and eight == 2 * (1 + 4 / 256)
    found = rank_bytes(model(state_bytes=eight), {"stage": 1}, world=8, global_batch=64, micro_batch=8)
    assert found["AdamW"] == pytest.approx((4 + eight) * 1000 / 8)


def test_offload_and_buckets():
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True, "reduce_bucket_size": 50}
    found = rank_bytes(model(), zero, world=2, global_batch=8, micro_batch=4)
    assert "AdamW" not in found and found["buckets"] == 2 * 50 * 2
    gathered = rank_bytes(model(), {"stage": 3, "reduce_bucket_size": 50}, world=2, global_batch=8, micro_batch=4)
    assert gathered["buckets"] == 50 * 2 + 1100 * 2


def test_the_proposed_micro_batch_fits_and_the_next_does_not():
    big = model(kept=Kept(block=1 << 26, state=1 << 22, rest=0, blocks=24), trained=300_000_000)
    for column in columns(big, global_batch=4096, micro_batch=0, gpu_gib=40):
        assert column.total[1] <= 0.9 * 40 * GIB and 4096 // column.world % column.micro_batch == 0
        if column.micro_batch < 4096 // column.world:
            following = 2 * column.micro_batch
            more = columns(big, global_batch=4096, micro_batch=following, gpu_gib=40)
            total = next(c.total[1] for c in more if c.world == column.world)
            assert total > 0.9 * 40 * GIB
    assert [c.micro_batch for c in columns(big, global_batch=100, micro_batch=0, gpu_gib=40)][2] == 0  # 100 on 64
    assert [c.micro_batch for c in columns(big, global_batch=4096, micro_batch=0, gpu_gib=1)] == [0, 0, 0]


def test_cache_bytes_are_those_of_a_file(tmp_path: Path):
    from tiny_data import SAMPLES, WIDTH, make_cache, make_shards

    from llm2clip_plugin.data.cache.shard_file import shard_bytes

    shard = sorted(make_cache(make_shards(tmp_path / "data")).glob("*.safetensors"))[0]
    head = int.from_bytes(shard.read_bytes()[:8], "little")
    header = json.loads(shard.read_bytes()[8 : 8 + head])
    keys = header["keys"]["shape"][0] // SAMPLES
    # key_starts and row_starts have one entry more than there are samples
    written = shard.stat().st_size - 8 - head - 16
    assert shard_bytes(SAMPLES, 2 * SAMPLES, WIDTH, "float16", key_bytes=keys) == written
