"""Which shards each node reads, simulated for remote data: no file is read.

    python -m scripts.benchmarks.reading --shards 6000 --steps 1000

Shards of 10,000 samples less those that img2dataset could not fetch (5 to 15 %). A node has 8
ranks. "Reads of a shard" is over all nodes: 1 is the least, and as many as nodes is what each node
reading everything would cost.
"""

import numpy as np

from llm2clip_plugin.data.sampler import Mixture
from scripts.benchmarks.common import parse

HEADS = (
    "window | ranks | shards that a node reads | reads of a shard | shards in a batch | "
    "batches between neighbors"
)


def row(sizes: list[int], window: int, ranks: int, steps: int, batch: int) -> str:
    """The first ``steps`` global batches, read by ``ranks``."""
    mixture = Mixture([sizes], [1.0], 0, [window])
    stops = np.cumsum(sizes)  # of each shard, among all samples
    nodes = max(1, ranks // 8)
    read = np.zeros((nodes, len(sizes)), bool)
    step_of = np.full(stops[-1], -1)  # each sample; -1: none yet
    shards_in_batch = []
    for step in range(steps):
        in_this_batch = np.zeros(len(sizes), bool)
        for node in range(nodes):
            draws = mixture.rank_draws(step * batch, node, batch // nodes, nodes)
            samples = [draw.index for draw in draws]
            assert (step_of[samples] == -1).all()  # no sample twice
            step_of[samples] = step
            shards = np.searchsorted(stops, samples, side="right")
            read[node, shards] = True
            in_this_batch[shards] = True
        shards_in_batch.append(in_this_batch.sum())
    both_read = (step_of[1:] >= 0) & (step_of[:-1] >= 0)
    distances = np.abs(np.diff(step_of))[both_read]
    cells = [
        str(window),
        str(ranks),
        f"{read.sum(1).mean():.0f}",
        f"{read.sum() / read.any(0).sum():.2f}",
        f"{np.mean(shards_in_batch):.0f}",
        f"{np.median(distances):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    counts = {
        "shards": (6000, "in all"),
        "steps": (1000, "global batches from the start of an epoch"),
    }
    windows = ([16, 64], "shards that are shuffled together")
    args = parse(
        __doc__, rounds=0, **counts, global_batch=(4096, "pairs"), windows=windows
    )
    sizes = np.random.default_rng(0).integers(8500, 9500, args.shards).tolist()
    print(f"| {HEADS} |")
    print("|---" * 6 + "|")
    for window in args.windows:
        for ranks in (1, 8, 64):
            print(row(sizes, window, ranks, args.steps, args.global_batch), flush=True)
