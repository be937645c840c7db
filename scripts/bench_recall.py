"""Recall@1/5/10 in both directions on 5,000 images x 25,000 captions: time and peak memory of three implementations.

    python scripts/bench_recall.py [--images 5000] [--captions 25000] [--threads 2] [--batch 64] [--json OUT]

- tiles: `llm2clip_plugin.evaluate.retrieval.recall`
- one-hot: LLM2CLIP and CLIP_benchmark with several captions per image: all scores and all correct pairs as
  N x M matrices, then for each k and direction top-k in batches of queries, one-hot over all items, times the correct
  pairs.
  `--batch`: their default is 64, LLM2CLIP's own script passes 1024
- row loop: LLM2CLIP with one caption per image, here with the owner's label instead of the diagonal: for each direction
  and k a Python loop over the queries, each with its own product and top-k

Each runs in a new process, in which its peak memory is measured, on synthetic embeddings with noise, so that recall is
neither 0 nor 1. All three must agree. With `--every N` the row loop runs every N-th query and its time is
multiplied by N.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from bench import argument_parser, in_new_process, peak_growth, timed

from llm2clip_plugin.evaluate.retrieval import recall

KS = (1, 5, 10)


def embeddings(images: int, captions: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalized embeddings of images and captions (five per image by default), and each caption's image."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(captions) * images // captions
    image = torch.randn(images, width, generator=generator)
    text = image[owner] + 8.0 * torch.randn(captions, width, generator=generator)
    return torch.nn.functional.normalize(image, dim=1), torch.nn.functional.normalize(text, dim=1), owner


def one_hot_way(
    image: torch.Tensor, text: torch.Tensor, owner: torch.Tensor, options: argparse.Namespace
) -> dict[str, float]:
    """Dense correct pairs times one-hot top-k, batch by batch."""
    correct = torch.zeros(len(text), len(image), dtype=torch.bool)
    correct[torch.arange(len(text)), owner] = True
    score = text @ image.T
    metrics = {}
    for k in KS:
        for side, scores, pairs in (("t2i", score, correct), ("i2t", score.T, correct.T)):
            hits = []
            for start in range(0, len(scores), options.batch):
                some = slice(start, start + options.batch)
                best = torch.topk(scores[some], k, dim=1).indices
                chosen = torch.nn.functional.one_hot(best, scores.shape[1])
                recalled = (chosen * pairs[some, None, :]).sum((1, 2)) / pairs[some].sum(1)
                hits.append(recalled > 0)
            metrics[f"{side}_r{k}"] = float(torch.cat(hits).double().mean())
    return metrics


def row_loop_way(
    image: torch.Tensor, text: torch.Tensor, owner: torch.Tensor, options: argparse.Namespace
) -> dict[str, float]:
    """Query by query, for each k: a product with all items and a top-k."""
    metrics = {}
    owned = torch.arange(len(image))
    for side, query, label, item, item_label in (
        ("t2i", text, owner, image, owned),
        ("i2t", image, owned, text, owner),
    ):
        for k in KS:
            queries = range(0, len(query), options.every)
            hits = [bool((item_label[torch.topk(query[q] @ item.T, k).indices] == label[q]).any()) for q in queries]
            metrics[f"{side}_r{k}"] = sum(hits) / len(hits)
    return metrics


def tiles_way(
    image: torch.Tensor, text: torch.Tensor, owner: torch.Tensor, options: argparse.Namespace
) -> dict[str, float]:
    """This package."""
    return recall(image, text, owner)


WAYS = {"tiles": tiles_way, "one-hot": one_hot_way, "row loop": row_loop_way}


def measure(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time and peak memory of one way in this process, and its metrics."""
    torch.set_num_threads(options.threads)
    arrays = embeddings(options.images, options.captions, options.width)
    (arrays[0] @ arrays[1][:64].T).sum()  # the first product starts the threads
    repeats = options.repeats if way == "tiles" else 1
    factor = options.every if way == "row loop" else 1  # its rows are independent of each other
    growth, runs = peak_growth(lambda: [timed(lambda: WAYS[way](*arrays, options)) for _ in range(repeats)])
    return {
        "seconds": factor * median(run.wall for run in runs),
        "peak_mib": growth / 2**20,
        "cpu_seconds": factor * mean(run.cpu for run in runs),
        "metrics": runs[-1].result,
    }


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=25000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="runs of the tiles; the median is reported")
    parser.add_argument("--batch", type=int, default=64, help="queries per batch of one-hot")
    parser.add_argument("--every", type=int, default=1, help="the row loop runs only every N-th query")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--way", choices=WAYS, help="measure one way in this process")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options)))
        return 0
    rows = {}
    for way in options.ways:
        row = rows[way] = in_new_process(measure, way, options)
        print(f"{way:9} {row['seconds']:8.2f} s, {row['cpu_seconds']:8.2f} CPU s, {row['peak_mib']:6.0f} MiB peak")
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
