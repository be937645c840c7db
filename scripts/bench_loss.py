"""Benchmark: the blocked contrastive loss against the full matrix of logits, forward and backward.

    python scripts/bench_loss.py --pairs 16384 --width 512

Each way runs in a separate process, so that its peak memory can be measured; prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

WAYS = ("blocked", "full")


def main() -> None:
    """Run both ways several times, alternating, and print medians and their ratios."""
    options = parser().parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            runs[way].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    median = {way: {key: statistics.median(run[key] for run in runs[way]) for key in runs[way][0]} for way in WAYS}
    ratio = {
        f"{key}_ratio": median["blocked"][key] / median["full"][key] for key in ("seconds", "cpu_seconds", "peak_bytes")
    }
    print(json.dumps({"pairs": options.pairs, "width": options.width, "dtype": options.dtype, **median, **ratio}))


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One forward and backward: seconds by the clock and of the processor, bytes above what stood before, loss."""
    import torch
    import torch.nn.functional as F

    from llm2clip_plugin.train.losses.infonce import contrastive_loss

    def full(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        logits = scale * image @ text.T
        labels = torch.arange(len(image), device=image.device)
        return (F.cross_entropy(logits.float(), labels) + F.cross_entropy(logits.T.float(), labels)) / 2

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    pairs = [
        F.normalize(torch.randn(options.pairs, options.width, device=device), dim=-1).to(dtype).requires_grad_()
        for _ in range(2)
    ]
    scale = torch.tensor([1 / 0.07], device=device, requires_grad=True)
    loss_of = contrastive_loss if options.way == "blocked" else full
    small = [side.detach()[:64].requires_grad_() for side in pairs]
    loss_of(*small, scale).backward()  # first use loads kernels
    before, start, cpu_start = peak(torch), time.perf_counter(), time.process_time()
    loss = loss_of(*pairs, scale)
    loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    cpu_seconds = time.process_time() - cpu_start
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak(torch) - before, "loss": loss.item()}


def peak(torch_module) -> int:
    """Highest memory so far: of the accelerator if there is one, else of the process."""
    if torch_module.cuda.is_available():
        return torch_module.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parser() -> argparse.ArgumentParser:
    """Options of the benchmark."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--pairs", type=int, default=16384)
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--way", choices=WAYS, help="run one way once, in this process")
    return options


if __name__ == "__main__":
    main()
