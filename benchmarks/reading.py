"""On how many nodes a shard of remote data is read, simulated: no file is read.

    python -m benchmarks.reading --shards 6000 --steps 1000

Shards of 10,000 samples less those that img2dataset could not fetch (5 to 15 %). A node has 8 ranks. 1 is the least; if
each node read everything, it would be the number of nodes.
"""

import numpy as np

from benchmarks.common import parse
from llm2clip_plugin.data.sampler import Mixture


def reads(sizes: list[int], window: int, nodes: int, steps: int, batch: int) -> float:
    """The mean over the shards that the first ``steps`` global batches touch."""
    mixture, stops, read = Mixture([sizes], [1.0], 0, [window]), np.cumsum(sizes), np.zeros((nodes, len(sizes)), bool)
    for step, node in np.ndindex(steps, nodes):
        samples = [draw.index for draw in mixture.rank_draws(step * batch, node, batch // nodes, nodes)]
        read[node, np.searchsorted(stops, samples, side="right")] = True
    return read.sum() / read.any(0).sum()


if __name__ == "__main__":
    counts = {"shards": (6000, "in all"), "steps": (1000, "global batches from the start of an epoch")}
    windows = ([16, 64], "shards that are shuffled together")
    args = parse(__doc__, rounds=0, **counts, global_batch=(4096, "pairs"), windows=windows)
    sizes = np.random.default_rng(0).integers(8500, 9500, args.shards).tolist()
    print("| window | ranks | reads of a shard |\n|---|---|---|")
    for window in args.windows:
        for nodes in (1, 8):
            count = reads(sizes, window, nodes, args.steps, args.global_batch)
            print(f"| {window} | {8 * nodes} | {count:.2f} |", flush=True)
