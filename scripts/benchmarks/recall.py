"""Recall@1/5/10 in both directions on 5,000 images x 25,000 captions: time and peak memory.

    OMP_NUM_THREADS=1 python -m scripts.benchmarks.recall --batch 1024

- llm2clip: ``llm2clip_plugin.evaluate.ranks.recall``, tiles and counted ranks
- one-hot: LLM2CLIP's and CLIP_benchmark's: scores and correct pairs as N x M matrices, then for
  each k and direction top-k in batches of queries (64 by default, 1024 in LLM2CLIP's script),
  one-hot over all items, times the pairs

Each runs in a new process on synthetic embeddings with noise, so that recall is neither 0 nor 1;
all must agree.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from llm2clip_plugin.evaluate.ranks import recall
from scripts.benchmarks.common import alternate_processes, parse, print_table


def one_hot_recall(
    image: Tensor, text: Tensor, owner: Tensor, batch: int
) -> dict[str, float]:
    """Dense correct pairs times one-hot top-k, batch by batch; ``owner``: each text's image."""
    correct = torch.zeros(len(text), len(image), dtype=torch.bool)
    correct[torch.arange(len(text)), owner] = True
    scores = text @ image.T
    metrics = {}
    for k in (1, 5, 10):
        metrics[f"t2i_r{k}"] = share_of_hits(scores, correct, k, batch)
        metrics[f"i2t_r{k}"] = share_of_hits(scores.T, correct.T, k, batch)
    return metrics


def share_of_hits(scores: Tensor, correct: Tensor, k: int, batch: int) -> float:
    """The share of queries (rows) with a correct item among the k of the highest scores."""
    hits = []
    for start in range(0, len(scores), batch):
        some_correct = correct[start : start + batch]
        top = torch.topk(scores[start : start + batch], k, dim=1).indices
        chosen = one_hot(top, scores.shape[1])
        correct_chosen = (chosen * some_correct[:, None, :]).sum((1, 2))
        hits.append(correct_chosen / some_correct.sum(1) > 0)
    return float(torch.cat(hits).double().mean())


def prepare(way: str, args: Namespace) -> Callable[[], dict[str, float]]:
    """One evaluation of normalized embeddings, with each caption's image."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(args.captions) * args.images // args.captions
    image = torch.randn(args.images, 768, generator=generator)
    noise = torch.randn(args.captions, 768, generator=generator)
    text = normalize(image[owner] + 8.0 * noise, dim=1)
    image = normalize(image, dim=1)
    (image @ text[:64].T).sum()  # the first product starts the threads
    if way == "one-hot":
        return partial(one_hot_recall, image, text, owner, args.batch)
    return partial(recall, image, text, owner)


if __name__ == "__main__":
    sizes = {
        "images": (5000, "in all"),
        "captions": (25000, "in all"),
        "batch": (64, "queries at once of one-hot"),
    }
    args = parse(__doc__, rounds=1, **sizes)
    ways = {way: partial(prepare, way) for way in ("one-hot", "llm2clip")}
    runs, memory = alternate_processes(ways, args, args.rounds)
    sizes = f"{args.images:,} images x {args.captions:,} captions"
    about = f"recall of {sizes}, one-hot of {args.batch} queries"
    columns = {"MiB above the inputs": memory}
    print_table(about, runs, amount=1, unit="evaluations", **columns)
    _, theirs = runs["one-hot"][0]
    _, ours = runs["llm2clip"][0]
    worst = max(abs(theirs[key] - value) for key, value in ours.items())
    print(f"\nrecall {ours}; largest difference {worst:.1e}")
    assert worst < 1e-3  # near-equal scores may swap between two orders of summation
