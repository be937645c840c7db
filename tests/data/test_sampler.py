import hashlib
from collections import Counter

import numpy as np
import pytest

from llm2clip_plugin.data import sampler
from llm2clip_plugin.data.sampler import (
    Mixture,
    PassOrder,
    Permutation,
    hash_words,
    rank_rows,
    sample_rng,
)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 100, 4095, 4096, 4097, 70_000])
def test_a_permutation_has_every_number_once(n: int) -> None:
    images = Permutation(n, 7)(np.arange(n))
    assert np.array_equal(np.sort(images), np.arange(n))


def test_permutations_look_random() -> None:
    n = 10_000
    places = np.arange(n)
    first = Permutation(n, 1)(places)
    second = Permutation(n, 2)(places)
    # correlations of independent permutations have a standard deviation of 1/sqrt(n) = 0.01
    assert abs(np.corrcoef(first, places)[0, 1]) < 0.05
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.05
    assert np.count_nonzero(first == places) < 10  # expected: 1 fixed point
    # expected 100 +- 9.5 each
    counts = np.bincount(first[:1000] * 10 // n, minlength=10)
    assert counts.min() > 60
    assert counts.max() < 140


def test_the_order_is_the_same_everywhere() -> None:
    """Numbers noted once: another platform, Python or numpy must not change the order of a run
    under way."""
    assert hash_words("sample", 1, 2) == 9827714916256478247
    assert Permutation(10, 3)(np.arange(10)).tolist() == [0, 9, 8, 5, 4, 2, 7, 3, 6, 1]
    draws = Mixture([(5,), (3,)], [1, 1], 0).batch_indices(6, 4)
    assert [tuple(draw) for draw in draws] == [
        (0, 4, 0),
        (1, 0, 0),
        (1, 2, 1),
        (0, 1, 1),
    ]
    assert sample_rng(0, 1, 2, 3).random() == 0.9603652096926553


@pytest.mark.parametrize(
    ("windows", "expected"), [((), "3343ccb28f0c4e20"), ((2, 0, 0), "eb4967cb254317c3")]
)
def test_the_order_of_several_epochs_is_the_same_everywhere(
    windows: tuple[int, ...], expected: str
) -> None:
    """Three epochs of three sources, noted once."""
    draws = Mixture(
        [(5000,) * 3, (7000,), (11,)], (1, 0.5, 2), 3, windows
    ).batch_indices(0, 60_000)
    assert (
        hashlib.sha256(np.array(draws, dtype=np.int64).tobytes()).hexdigest()[:16]
        == expected
    )


@pytest.mark.parametrize("windows", [(), (1, 2)])
@pytest.mark.parametrize("weights", [(1, 1), (2, 0.5), (0.3, 1.7)])
def test_any_cut_gives_the_same_order(
    weights: tuple[float, float], windows: tuple[int, ...]
) -> None:
    mixture = Mixture([(50, 70, 30), (40, 3)], weights, 5, windows)
    total = 3 * mixture.epoch_length + 11
    whole = mixture.batch_indices(0, total)
    pieces = [
        draw
        for start in range(0, total, 13)
        for draw in mixture.batch_indices(start, min(13, total - start))
    ]
    assert pieces == whole
    assert (
        Mixture([(50, 70, 30), (40, 3)], weights, 5, windows).batch_indices(17, 100)
        == whole[17:117]
    )


@pytest.mark.parametrize("windows", [(), (1, 2)])
def test_an_epoch_is_every_sample_once(windows: tuple[int, ...]) -> None:
    mixture = Mixture([(50, 70, 30), (40, 3)], (1, 1), 5, windows)
    assert mixture.epoch_length == 193
    epochs = [mixture.batch_indices(start, 193) for start in (0, 193, 386)]
    for number, epoch in enumerate(epochs):
        assert len({draw[:2] for draw in epoch}) == 193
        assert {draw.epoch for draw in epoch} == {number}
    assert [draw[:2] for draw in epochs[0]] != [draw[:2] for draw in epochs[1]]
    other = Mixture([(50, 70, 30), (40, 3)], (1, 1), 6, windows).batch_indices(0, 193)
    assert [draw[:2] for draw in epochs[0]] != [draw[:2] for draw in other]


def test_weights_and_passes_without_replacement() -> None:
    mixture = Mixture([(100,), (60,)], (0.5, 2.0), 0)
    assert mixture.draws == [50, 120]
    draws = mixture.batch_indices(0, 4 * mixture.epoch_length)
    counts = Counter(draw.source for draw in draws)
    assert counts == {0: 200, 1: 480}
    for source, length in ((0, 100), (1, 60)):
        seen = [draw for draw in draws if draw.source == source]
        for number in range(len(seen) // length):
            one_pass = seen[number * length : (number + 1) * length]
            assert sorted(draw.index for draw in one_pass) == list(range(length))
            assert {draw.epoch for draw in one_pass} == {number}
    # half an epoch: mixed, not one after the other
    first = Counter(draw.source for draw in draws[:85])
    assert 10 < first[0] < 40


def test_a_shuffle_window_limits_the_shards_in_use() -> None:
    sizes = [10] * 20
    order = PassOrder(sizes, 4, key=1)(np.arange(200))
    assert np.array_equal(np.sort(order), np.arange(200))
    shards = order // 10
    for first in range(0, 200, 40):
        assert len(set(shards[first : first + 40].tolist())) == 4
    assert shards[:40].tolist() != sorted(shards[:40].tolist())


@pytest.mark.parametrize("windows", [(0, 0), (3, 0), (3, 2)])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_ranks_cut_one_global_batch(world: int, windows: tuple[int, int]) -> None:
    mixture = Mixture([(1500,) * 7, (1300,) * 5], (1, 1), 3, windows)
    for position in (0, 24, 96, 9600):
        whole = mixture.batch_indices(position, 24)
        parts = [
            mixture.rank_draws(position, rank, 24 // world, world)
            for rank in range(world)
        ]
        draws = [draw for part in parts for draw in part]
        assert sorted(draws) == sorted(whole)
        assert any(windows) or draws == whole


@pytest.mark.parametrize(("nodes", "reads"), [(1, 1), (2, 1), (8, 1), (3, 1.2)])
def test_each_node_reads_its_share_of_remote_shards(nodes: int, reads: float) -> None:
    """Shards of equal size that the nodes divide are read once over all nodes, in every pass, every
    sample once."""
    shards = 64
    size = 1000
    batch = 384
    mixture = Mixture([(size,) * shards], (1,), 0, (16,))
    for number in range(2):
        read = [set[int]() for _ in range(nodes)]
        samples = set[int]()
        for position in range(
            number * 64_000 // batch * batch,
            (number + 1) * 64_000 // batch * batch,
            batch,
        ):
            for node in range(nodes):
                draws = mixture.rank_draws(position, node, batch // nodes, nodes)
                read[node] |= {
                    draw.index // size for draw in draws if draw.epoch == number
                }
                samples |= {draw.index for draw in draws if draw.epoch == number}
        assert len(samples) > 64_000 - batch
        assert sum(map(len, read)) <= reads * shards
        for node in (
            range(nodes) if reads == 1 else ()
        ):  # what it downloads ahead is what it reads
            starts = range(number * 64_000, (number + 1) * 64_000, 16_000)
            ahead = (
                mixture.window_shards(0, start, node, nodes, batch)[0]
                for start in starts
            )
            assert set().union(*ahead) == read[node]


@pytest.mark.parametrize(("nodes", "batch"), [(3, 6144), (8, 6144), (2, 8), (2, 64)])
def test_nodes_download_ahead_what_they_read_of_mixed_sources(
    nodes: int, batch: int
) -> None:
    mixture = Mixture([(1000,) * 70, (900,) * 60], (1, 0.5), 0, (64, 64))
    for position in range(
        0, 17 * batch, batch
    ):  # of 6144 also past the end of an epoch
        for node in range(nodes):
            draws = mixture.rank_draws(position, node, batch // nodes, nodes)
            ahead = [
                set().union(*mixture.window_shards(n, position, node, nodes, batch))
                for n in (0, 1)
            ]
            assert all(
                draw.index // (1000, 900)[draw.source] in ahead[draw.source]
                for draw in draws
            )


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_global_batch_of_one_source(world: int) -> None:
    """Over four epochs: any number of ranks, any start, every sample once a pass, and each source
    its share."""
    # 70, 20 and 50 draws an epoch
    sizes = [(50, 20), (40,), (12, 13)]
    weights = (1, 0.5, 2)
    batch = 12
    mixture = Mixture(sizes, weights, 3, batch=batch)
    steps = 4 * mixture.epoch_length // batch
    global_batches = []
    for step in range(steps):
        fresh = Mixture(sizes, weights, 3, batch=batch)  # as after a resume
        global_batches.append(
            [
                fresh.batch_indices(*rank_rows(step * batch, rank, batch // world))
                for rank in range(world)
            ]
        )
    whole = [draw for step in global_batches for part in step for draw in part]
    assert whole == mixture.batch_indices(0, steps * batch)
    for step in global_batches:
        assert len({draw.source for part in step for draw in part}) == 1
    for source, (length, draws) in enumerate(
        zip((70, 40, 25), (70, 20, 50), strict=True)
    ):
        seen = [draw for draw in whole if draw.source == source]
        for epoch in range(1, 5):  # what is left of less than a batch is carried over
            before = sum(
                draw.source == source
                for draw in whole[: epoch * mixture.epoch_length // batch * batch]
            )
            assert abs(before - epoch * draws) <= 3 * batch
        assert abs(len(seen) - 4 * draws) <= batch
        for number in range(len(seen) // length):
            one_pass = seen[number * length : (number + 1) * length]
            assert sorted(draw.index for draw in one_pass) == list(range(length))
    order = [step[0][0].source for step in global_batches]
    assert order[: len(order) // 4] != sorted(order[: len(order) // 4])
    assert order != sorted(order)


def test_sources_are_those_of_the_whole_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from any side what a stored order would say."""
    monkeypatch.setattr(sampler, "BLOCK", 64)
    draws = [700, 3, 400]
    expected = np.searchsorted(
        np.cumsum(draws), Permutation(1103, 5)(np.arange(1103)), side="right"
    )
    before = {source: np.cumsum(expected == source) - 1 for source in range(3)}
    order = sampler.SourceOrder(draws, 5)
    for offset in (0, 100, 1000, 999, 30, 1102, 552, 551, 400):
        count = min(103, 1103 - offset)
        labels, ranks = order(offset, count)
        assert labels.tolist() == expected[offset : offset + count].tolist()
        assert ranks.tolist() == [
            before[label][offset + i] for i, label in enumerate(labels.tolist())
        ]


def test_an_epoch_of_two_large_sources_begins_without_a_stall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight ranks of 60 M samples twice: a batch costs the draws of a batch, also where an epoch
    begins."""
    computed = [0]
    call = Permutation.__call__

    def counting(self: Permutation, positions: np.ndarray) -> np.ndarray:
        computed[0] += len(positions)
        return call(self, positions)

    monkeypatch.setattr(Permutation, "__call__", counting)
    for rank in (0, 7):
        mixture = Mixture([(5000,) * 12_000] * 2, (1, 1), 0)
        for step in range(100):  # past the end of the first epoch
            position = mixture.epoch_length - 50 * 4096 + step * 4096
            computed[0] = 0
            assert (
                len(set(mixture.batch_indices(*rank_rows(position, rank, 512)))) == 512
            )
            assert computed[0] <= (50 * 4096 + 2 * 512 if not step else 4096 + 2 * 512)


def test_a_samples_randomness_is_its_own() -> None:
    words = ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))
    assert len({sample_rng(*each).random() for each in words}) == 5
    assert sample_rng(1, 2, 3, 4).random() == sample_rng(1, 2, 3, 4).random()
