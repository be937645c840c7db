"""Recall@1/5/10 both ways on 5,000 images x 25,000 captions: time and peak memory against the usual ways.

    python scripts/bench_recall.py [--images 5000] [--captions 25000] [--width 768] [--threads 2] [--json OUT]

- blocks: `llm2clip_plugin.evaluate.retrieval.recall`
- one-hot: all scores and all right pairs as N x M matrices, then for each k and direction top-k in batches of 64
  queries, made one-hot over all items and multiplied with the right pairs (what public retrieval benchmarks do)
- row loop: all scores, then each row sorted and searched for its first right item

Each runs in a process of its own, so that its peak memory is its own; embeddings are made beforehand by seed and
noise, so that recall is neither 0 nor 1. The three must agree.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from llm2clip_plugin.evaluate.retrieval import recall

KS = (1, 5, 10)
BATCH = 64  # queries at once in the one-hot way


def embeddings(images: int, captions: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised images, captions (five an image at the default sizes) and owners."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(captions) * images // captions
    image = torch.randn(images, width, generator=generator)
    text = image[owner] + 8.0 * torch.randn(captions, width, generator=generator)
    return torch.nn.functional.normalize(image, dim=1), torch.nn.functional.normalize(text, dim=1), owner


def one_hot_way(image: torch.Tensor, text: torch.Tensor, owner: torch.Tensor) -> dict[str, float]:
    """Dense right pairs times one-hot top-k, batch by batch."""
    right = torch.zeros(len(text), len(image), dtype=torch.bool)
    right[torch.arange(len(text)), owner] = True
    score = text @ image.T
    metrics = {}
    for k in KS:
        for side, scores, pairs in (("t2i", score, right), ("i2t", score.T, right.T)):
            hits = []
            for start in range(0, len(scores), BATCH):
                best = torch.topk(scores[start : start + BATCH], k, dim=1).indices
                chosen = torch.nn.functional.one_hot(best, scores.shape[1])
                hits.append((chosen * pairs[start : start + BATCH, None, :]).sum((1, 2)) > 0)
            metrics[f"{side}_r{k}"] = float(torch.cat(hits).double().mean())
    return metrics


def row_loop_way(image: torch.Tensor, text: torch.Tensor, owner: torch.Tensor) -> dict[str, float]:
    """Sort every row and look where its first right item stands."""
    score = text @ image.T
    metrics = {}
    owned = torch.arange(len(image))
    for side, scores, query_label, item_label in (("t2i", score, owner, owned), ("i2t", score.T, owned, owner)):
        rank = []
        for row, label in zip(scores, query_label, strict=True):
            order = torch.argsort(row, descending=True)
            rank.append(int(torch.nonzero(item_label[order] == label)[0]))
        for k in KS:
            metrics[f"{side}_r{k}"] = sum(place < k for place in rank) / len(rank)
    return metrics


WAYS = {"blocks": recall, "one-hot": one_hot_way, "row loop": row_loop_way}


def memory(field: str) -> int:
    """KiB of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def measure(way: str, options: argparse.Namespace) -> None:
    """Time one way in this process and print a line of JSON."""
    torch.set_num_threads(options.threads)
    arrays = embeddings(options.images, options.captions, options.width)
    (arrays[0] @ arrays[1][:64].T).sum()  # the first product starts the threads
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten: making the embeddings had its own
    before = memory("VmRSS")
    repeats = options.repeats if way == "blocks" else 1
    taken, started = [], time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        metrics = WAYS[way](*arrays)
        taken.append(time.perf_counter() - start)
    cpu = (time.process_time() - started) / repeats
    peak = memory("VmHWM") - before
    print(
        json.dumps(
            {"seconds": sorted(taken)[len(taken) // 2], "peak_mib": peak / 1024, "cpu_seconds": cpu, "metrics": metrics}
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=25000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="of the block way; the median counts")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parser.add_argument("--way", choices=WAYS, help="measure one way in this process")
    options = parser.parse_args()
    if options.way:
        measure(options.way, options)
        return 0
    rows = {}
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows[way] = json.loads(done.stdout)
        times = rows[way]["seconds"] / rows["blocks"]["seconds"]
        peak = rows[way]["peak_mib"]
        cpu = f"{rows[way]['cpu_seconds']:7.2f} CPU s"
        print(f"{way:9} {rows[way]['seconds']:8.2f} s ({times:5.1f}x), {cpu}, {peak:5.0f} MiB beside the inputs")
    worst = max(
        abs(rows[way]["metrics"][key] - value) for way in WAYS for key, value in rows["blocks"]["metrics"].items()
    )
    print(f"recall {rows['blocks']['metrics']}; largest difference between the ways {worst:.1e}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if worst < 1e-3 else 1  # near-equal scores may swap between two orders of summation


if __name__ == "__main__":
    sys.exit(main())
