"""Recall@1/5/10 in both directions on 5,000 images x 25,000 captions: time and peak memory.

    OMP_NUM_THREADS=1 python -m benchmarks.recall --batch 1024

- llm2clip: ``llm2clip_plugin.evaluate.retrieval.recall``, tiles and counted ranks
- one-hot: LLM2CLIP's and CLIP_benchmark's: scores and correct pairs as N x M matrices, then for each k and direction
  top-k in batches of queries (64 by default, 1024 in LLM2CLIP's script), one-hot over all items, times the pairs

Each runs in a new process on synthetic embeddings with noise, so that recall is neither 0 nor 1; all must agree.
"""

import argparse

import torch
from torch import Tensor

from benchmarks.common import Run, alternate_processes, parser, peak_growth, print_table, timed
from llm2clip_plugin.evaluate.retrieval import recall

KS = (1, 5, 10)


def embeddings(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized embeddings of images and captions, and each caption's image."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(args.captions) * args.images // args.captions
    image = torch.randn(args.images, 768, generator=generator)
    text = image[owner] + 8.0 * torch.randn(args.captions, 768, generator=generator)
    return torch.nn.functional.normalize(image, dim=1), torch.nn.functional.normalize(text, dim=1), owner


def one_hot(image: Tensor, text: Tensor, owner: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Dense correct pairs times one-hot top-k, batch by batch."""
    correct = torch.zeros(len(text), len(image), dtype=torch.bool)
    correct[torch.arange(len(text)), owner] = True
    score = text @ image.T
    metrics = {}
    for k in KS:
        for side, scores, pairs in (("t2i", score, correct), ("i2t", score.T, correct.T)):
            hits = []
            for start in range(0, len(scores), args.batch):
                some = slice(start, start + args.batch)
                best = torch.topk(scores[some], k, dim=1).indices
                chosen = torch.nn.functional.one_hot(best, scores.shape[1])
                hits.append((chosen * pairs[some, None, :]).sum((1, 2)) / pairs[some].sum(1) > 0)
            metrics[f"{side}_r{k}"] = float(torch.cat(hits).double().mean())
    return metrics


WAYS = {"one-hot": one_hot, "llm2clip": lambda image, text, owner, args: recall(image, text, owner)}


def measure(way: str, args: argparse.Namespace) -> tuple[int, Run]:
    """Peak memory and time of one way in this process, and its metrics."""
    arrays = embeddings(args)
    (arrays[0] @ arrays[1][:64].T).sum()  # the first product starts the threads
    return peak_growth(lambda: timed(lambda: WAYS[way](*arrays, args)))


def main() -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument("--images", type=int, default=5000)
    options.add_argument("--captions", type=int, default=25000)
    options.add_argument("--batch", type=int, default=64, help="queries per batch of one-hot")
    args = options.parse_args()
    runs, memory = alternate_processes(measure, WAYS, args)
    about = f"recall of {args.images:,} images x {args.captions:,} captions, one-hot of {args.batch} queries"
    print_table(about, runs, amount=1, unit="evaluations", **{"MiB above the inputs": memory})
    theirs, ours = (of_way[0].result for of_way in runs.values())
    worst = max(abs(theirs[key] - value) for key, value in ours.items())
    print(f"\nrecall {ours}; largest difference {worst:.1e}")
    assert worst < 1e-3  # near-equal scores may swap between two orders of summation


if __name__ == "__main__":
    main()
