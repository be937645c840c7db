"""Recall@1/5/10 both ways on 5,000 images x 25,000 captions: time and peak memory against the reference's two ways.

    python scripts/bench_recall.py [--images 5000] [--captions 25000] [--threads 2] [--batch 64] [--json OUT]

- tiles: `llm2clip_plugin.evaluate.retrieval.recall`
- one-hot: what LLM2CLIP and CLIP_benchmark do with several captions an image: all scores and all right pairs as N x M
  matrices, then for each k and direction top-k in batches of queries, made one-hot over all items and multiplied with
  the right pairs. `--batch`: 64 is their default, 1024 what LLM2CLIP's own script gives
- row loop: what LLM2CLIP does with one caption an image, here with the owner's label in place of the diagonal: for each
  direction and k a Python loop over the queries, each with its own product and top-k

Each runs in a process of its own, so that its peak memory is its own; embeddings are made beforehand by seed and
noise, so that recall is neither 0 nor 1. The three must agree. The row loop may ask every `--every`-th query alone; its
time is then multiplied by that.
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


def embeddings(images: int, captions: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised images, captions (five an image at the default sizes) and owners."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(captions) * images // captions
    image = torch.randn(images, width, generator=generator)
    text = image[owner] + 8.0 * torch.randn(captions, width, generator=generator)
    return torch.nn.functional.normalize(image, dim=1), torch.nn.functional.normalize(text, dim=1), owner


def one_hot_way(
    image: torch.Tensor, text: torch.Tensor, owner: torch.Tensor, options: argparse.Namespace
) -> dict[str, float]:
    """Dense right pairs times one-hot top-k, batch by batch."""
    right = torch.zeros(len(text), len(image), dtype=torch.bool)
    right[torch.arange(len(text)), owner] = True
    score = text @ image.T
    metrics = {}
    for k in KS:
        for side, scores, pairs in (("t2i", score, right), ("i2t", score.T, right.T)):
            hits = []
            for start in range(0, len(scores), options.batch):
                some = slice(start, start + options.batch)
                best = torch.topk(scores[some], k, dim=1).indices
                chosen = torch.nn.functional.one_hot(best, scores.shape[1])
                found = (chosen * pairs[some, None, :]).sum((1, 2)) / pairs[some].sum(1)
                hits.append(found > 0)
            metrics[f"{side}_r{k}"] = float(torch.cat(hits).double().mean())
    return metrics


def row_loop_way(
    image: torch.Tensor, text: torch.Tensor, owner: torch.Tensor, options: argparse.Namespace
) -> dict[str, float]:
    """Query by query: a product with all items and a top-k, anew for each k."""
    metrics = {}
    owned = torch.arange(len(image))
    for side, query, label, item, item_label in (
        ("t2i", text, owner, image, owned),
        ("i2t", image, owned, text, owner),
    ):
        for k in KS:
            asked = range(0, len(query), options.every)
            hits = [bool((item_label[torch.topk(query[q] @ item.T, k).indices] == label[q]).any()) for q in asked]
            metrics[f"{side}_r{k}"] = sum(hits) / len(hits)
    return metrics


def tiles_way(
    image: torch.Tensor, text: torch.Tensor, owner: torch.Tensor, options: argparse.Namespace
) -> dict[str, float]:
    """Ours."""
    return recall(image, text, owner)


WAYS = {"tiles": tiles_way, "one-hot": one_hot_way, "row loop": row_loop_way}


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
    repeats = options.repeats if way == "tiles" else 1
    times = options.every if way == "row loop" else 1  # its rows are independent of each other
    taken, started = [], time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        metrics = WAYS[way](*arrays, options)
        taken.append(times * (time.perf_counter() - start))
    cpu = times * (time.process_time() - started) / repeats
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
    parser.add_argument("--repeats", type=int, default=3, help="of our way; the median counts")
    parser.add_argument("--batch", type=int, default=64, help="queries at once in the one-hot way")
    parser.add_argument("--every", type=int, default=1, help="the row loop asks only every so many-th query")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parser.add_argument("--way", choices=WAYS, help="measure one way in this process")
    options = parser.parse_args()
    if options.way:
        measure(options.way, options)
        return 0
    rows = {}
    for way in options.ways:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = rows[way] = json.loads(done.stdout)
        print(f"{way:9} {row['seconds']:8.2f} s, {row['cpu_seconds']:8.2f} CPU s, {row['peak_mib']:6.0f} MiB beside")
    ours = rows[options.ways[0]]
    for way, row in list(rows.items())[1:]:
        ratios = ", ".join(f"{row[key] / ours[key]:.1f}x {key}" for key in ("seconds", "cpu_seconds", "peak_mib"))
        print(f"{way} against {options.ways[0]}: {ratios}")
    exact = [way for way in rows if way != "row loop" or options.every == 1]
    worst = max(abs(rows[way]["metrics"][key] - value) for way in exact for key, value in ours["metrics"].items())
    print(f"recall {ours['metrics']}; largest difference between {', '.join(exact)}: {worst:.1e}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if worst < 1e-3 else 1  # near-equal scores may swap between two orders of summation


if __name__ == "__main__":
    sys.exit(main())
