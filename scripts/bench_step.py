"""A training step against a bare forward/backward/AdamW loop on the same tensors.

    python scripts/bench_step.py --towers vit-s vit-b --batch 8 --rounds 5

Both ways train the same dual encoder from the same weights; their steps alternate. Prints one JSON line per tower:
median seconds per step of each way, their ratio (bare / ours, 1 is equal) by wall and by processor time, FLOP/s as a
fraction of the measured peak of matrix products (on a CPU both by processor time, so that other processes don't
count), the fraction of a step that measuring its phases takes, and the fraction of the step spent waiting for data
(512-pixel JPEGs from a shard, decoded by loader workers while the step runs).
"""

import argparse
import copy
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench import alternate, argument_parser, median_seconds, timed, write_tar
from PIL import Image
from torch import Tensor

from llm2clip_plugin.contracts import TeacherIdentity
from llm2clip_plugin.data.cache import CacheWriter, EmbeddingCache, caption_rows
from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.data.loader import make_loader
from llm2clip_plugin.data.pairs import PairDataset
from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.train.config import LossConfig, OptimConfig, Precision
from llm2clip_plugin.train.deepspeed_config import EnginePlan, complete
from llm2clip_plugin.train.engine import Engine, start_ranks
from llm2clip_plugin.train.losses.base import weighted_terms
from llm2clip_plugin.train.model import trained_parameters
from llm2clip_plugin.train.optim import parameter_groups
from llm2clip_plugin.train.step import TowerStep
from llm2clip_plugin.train.timing import HostClock, StepTimer, make_clock
from llm2clip_plugin.train.timing import timed as timed_phase
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.family import DualConfig

TOWERS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "vit-s": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
    "vit-b": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
WIDTH = 640  # of the teacher's embeddings
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # of the first loss; bf16 has three digits
OPTIM = OptimConfig(lr=1e-4, layer_decay=0.85, max_grad_norm=5.0)


def main() -> None:
    """Measure each tower and print its line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--towers", nargs="+", default=["vit-s", "vit-b"], choices=list(TOWERS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="bf16: under autocast if bare")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="loader processes while measuring the wait for data")
    options = parser.parse_args()
    device = start_ranks()
    peak = matmul_peak(device, torch.bfloat16 if options.precision == "bf16" else torch.float32)
    for name in options.towers:
        print(json.dumps({"tower": name, **measure(name, options, device, peak)}), flush=True)


def measure(name: str, options: argparse.Namespace, device: torch.device, peak: float) -> dict[str, Any]:
    """Both ways, alternating; then ours over a loader."""
    dual = make_dual(name)
    batch = make_batch(options.batch)
    bare, flops = bare_step(copy.deepcopy(dual).to(device), batch, device, bf16=options.precision == "bf16")
    ours = our_step(dual, options.batch, options.precision)
    ways = {"bare": bare, "ours": lambda: float(ours(batch)[0])}
    first = {way: step() for way, step in ways.items()}  # before rounding lets the weights drift apart
    runs = alternate(ways, options.rounds, warm_up=False)
    wall, cpu = ({way: median_seconds(runs[way], clock) for way in runs} for clock in ("wall", "cpu"))
    return {
        "batch": options.batch,
        "bare_seconds": wall["bare"],
        "ours_seconds": wall["ours"],
        "ratio": wall["bare"] / wall["ours"],
        "processor_ratio": cpu["bare"] / cpu["ours"],
        "flops": flops,
        "flop_share_of_peak": flops / median_seconds(runs["ours"]) / peak,
        "matmul_peak_gflops": peak / 1e9,
        "timing_share": timing_seconds(ours, batch, device) / median_seconds(runs["ours"]),
        "wait_share": wait_share(ours, options),
        "losses_agree": abs(first["bare"] - first["ours"]) < TOLERANCE[options.precision],
    }


def make_dual(name: str) -> DualEncoder:
    """A CLIP tower of patches of 16 at 224 pixels with random weights, and the paper's adapter."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    tower = CLIPVisionModel(CLIPVisionConfig(image_size=224, patch_size=16, **TOWERS[name]))
    return DualEncoder(tower, DualConfig(projection_dim=512, llm_width=WIDTH)).train()


def make_batch(size: int) -> dict[str, Any]:
    """Random pixels and embeddings, made once."""
    generator = torch.Generator().manual_seed(0)
    return {
        "pixels": torch.randint(0, 256, (size, 224, 224, 3), dtype=torch.uint8, generator=generator),
        "embeddings": torch.randn(size, WIDTH, generator=generator),
        "caption_hashes": torch.arange(size),
        "image_ids": torch.arange(size),
        "keys": [str(i) for i in range(size)],
        "position": size,
    }


def bare_step(
    dual: DualEncoder, batch: dict[str, Any], device: torch.device, *, bf16: bool
) -> tuple[Callable[[], float], float]:
    """The bare loop's step, and the floating point operations of its forward and backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    normalize = Normalize(ImageConfig(), device)
    groups = parameter_groups(trained_parameters(dual, OPTIM), OPTIM.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)
    parameters = [p for p in dual.parameters() if p.requires_grad]
    labels = torch.arange(len(batch["keys"]), device=device)

    def forward_backward() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            image, text, *_ = dual(normalize(batch["pixels"]), batch["embeddings"].to(device))
            logits = dual.logit_scale.exp() * image @ text.T
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        optimizer.zero_grad()
        loss.backward()
        return loss

    def step() -> float:
        loss = forward_backward()
        torch.nn.utils.clip_grad_norm_(parameters, OPTIM.max_grad_norm)
        optimizer.step()
        return loss.item()

    with FlopCounterMode(display=False) as counter:
        forward_backward()
    return step, float(counter.get_total_flops())


def our_step(dual: DualEncoder, size: int, precision: Precision = "fp32") -> TowerStep:
    """The training step of this project on one rank, with ZeRO stage 0."""
    plan = EnginePlan(
        global_batch=size,
        micro_batch=size,
        accumulation=1,
        precision=precision,
        optim=OPTIM,
        warmup_steps=0,
        total_steps=100,
        hidden_size=dual.tower.config.hidden_size,
    )
    groups = parameter_groups(trained_parameters(dual, OPTIM), OPTIM.weight_decay)
    engine = Engine(dual, groups, OPTIM, complete({}, plan))
    return TowerStep(
        engine,
        weighted_terms(LossConfig()),
        seed=0,
        text_noise=False,
        normalize=Normalize(ImageConfig(), engine.device),
    )


def timing_seconds(step: TowerStep, batch: dict[str, Any], device: torch.device) -> float:
    """Seconds that a step's timer takes: marks of a step x the mean of 10,000 of them."""

    class Counting(HostClock):
        marks = 0

        def mark(self) -> float:
            self.marks += 1
            return super().mark()

    clock, count = Counting(), 10_000
    with StepTimer(clock) as timer:
        timer.start()
        step(batch)
        timer.stop()
    with StepTimer(make_clock(device)) as timer:
        start = time.perf_counter()
        for _ in range(count // 100):  # steps of 102 marks
            timer.start()
            for _ in range(50):
                with timed_phase("backward"):
                    pass
            timer.stop()
            timer.totals()
        return clock.marks * (time.perf_counter() - start) / (count // 100 * 102)


def wait_share(step: TowerStep, options: argparse.Namespace) -> float:
    """Fraction of the time of ``rounds`` steps spent waiting for the loader, after one step that starts it."""
    with tempfile.TemporaryDirectory() as folder:
        waited, total, start = 0.0, 0.0, 0.0
        write_jpegs(Path(folder), max(16, options.batch))
        batches = jpeg_batches(Path(folder), batch=options.batch, workers=options.workers)
        for number in range(options.rounds + 1):
            start = time.perf_counter()
            batch = next(batches)
            ready = time.perf_counter()
            step(batch)
            if number:
                waited += ready - start
                total += time.perf_counter() - start
        return waited / total


def write_jpegs(folder: Path, count: int) -> None:
    """A shard of 512-pixel JPEGs with a cache of random embeddings in ``folder``/cache."""
    generator = np.random.default_rng(0)
    files = []
    for number in range(count):
        smooth = generator.integers(0, 256, (32, 32, 3), np.uint8)
        body = io.BytesIO()
        Image.fromarray(smooth).resize((512, 512), Image.Resampling.BICUBIC).save(body, "JPEG", quality=90)
        files += [(f"{number:05d}.jpg", body.getvalue()), (f"{number:05d}.txt", f"caption {number}".encode())]
    write_tar(folder / "00000.tar", files)
    identity = TeacherIdentity(
        llm="random",
        revision="",
        weights_sha256="0" * 64,
        adapter_sha256="",
        attention="causal",
        pooling="last",
        layer=-1,
        prompt="",
        chat_template="",
        max_tokens=64,
        width=WIDTH,
    )
    source = open_source(SourceConfig(path=str(folder)))
    writer = CacheWriter(folder / "cache", identity)
    for shard in source.shards:
        pairs = [source.captions(shard.start + i) for i in range(shard.size)]
        rows = caption_rows([captions for _, captions in pairs])
        writer.write_shard(shard.name, [key for key, _ in pairs], rows, torch.randn(len(rows), WIDTH))
    writer.finish()


def jpeg_batches(folder: Path, *, batch: int, workers: int) -> Iterator[dict[str, Any]]:
    """Batches over the shard of ``write_jpegs``."""
    source = open_source(SourceConfig(path=str(folder)))
    dataset = PairDataset([source], [EmbeddingCache.open(folder / "cache")], ImageConfig(size=224), seed=0)
    return iter(make_loader(dataset, local_batch=batch, workers=workers))


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products, the best of 8, by processor time on a CPU."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    return 2 * side**3 / min(timed(lambda: (a @ b).sum().item()).seconds for _ in range(8))


if __name__ == "__main__":
    main()
