"""Which shards each node reads, simulated for remote data: no file is read.

    python -m benchmarks.reading --shards 6000 --steps 1000

Shards of 10,000 samples less those that img2dataset could not fetch (5 to 15 %). A node has 8 ranks. "Reads of a shard"
is over all nodes: 1 is the least, and as many as nodes is what each node reading everything would cost.
"""

import argparse

import numpy as np

from llm2clip_plugin.data.sampler import Mixture

GPUS_OF_A_NODE = 8


def main() -> None:
    """Print a row for each number of ranks and window."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shards", type=int, default=6000)
    options.add_argument("--steps", type=int, default=1000, help="global batches from the start of an epoch")
    options.add_argument("--global-batch", type=int, default=4096)
    options.add_argument("--windows", nargs="+", type=int, default=[16, 64], help="shards that are shuffled together")
    args = options.parse_args()
    sizes = np.random.default_rng(0).integers(8500, 9500, args.shards).tolist()
    names = (
        "window | ranks | shards that a node reads | reads of a shard | shards in a batch | batches between neighbors"
    )
    print(f"| {names} |")
    print("|---" * 6 + "|")
    for window in args.windows:
        for ranks in (1, 8, 64):
            print(row(sizes, window, ranks, args.steps, args.global_batch), flush=True)


def row(sizes: list[int], window: int, ranks: int, steps: int, batch: int) -> str:
    """The first ``steps`` global batches, read by ``ranks``."""
    nodes = max(1, ranks // GPUS_OF_A_NODE)
    mixture, stops = Mixture([sizes], [1.0], 0, [window]), np.cumsum(sizes)
    read: list[set[int]] = [set() for _ in range(nodes)]
    step_of = np.full(stops[-1], -1)
    in_batch = []
    for step in range(steps):
        shards: set[int] = set()
        for node in range(nodes):
            samples = [draw.index for draw in mixture.rank_draws(step * batch, node, batch // nodes, nodes)]
            assert (step_of[samples] == -1).all()  # no sample twice
            step_of[samples] = step
            own = set(np.searchsorted(stops, samples, side="right").tolist())
            read[node] |= own
            shards |= own
        in_batch.append(len(shards))
    both = (step_of[1:] >= 0) & (step_of[:-1] >= 0)
    distance = np.median(np.abs(np.diff(step_of))[both])
    counts = [len(own) for own in read]
    reads = sum(counts) / len(set().union(*read))
    cells = [window, ranks, f"{np.mean(counts):.0f}", f"{reads:.2f}", f"{np.mean(in_batch):.0f}", f"{distance:.0f}"]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
