"""Hashes and permutations that are the same on every platform: what the order of samples is made of."""

import hashlib

import numpy as np

FEISTEL_ROUNDS = 6


def hash_words(*words: int | str) -> int:
    """64-bit hash of all ``words``, the same on every platform and version."""
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest(), "little")


class Permutation:
    """A permutation of 0 .. n-1 that is computed, not stored: a Feistel network, walked until it lands below n.

    The network permutes 4^b numbers, 4^b >= n > 4^(b-1), so a walk takes less than 4 steps on average.
    """

    def __init__(self, n: int, key: int) -> None:
        self.n = n
        self.half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)  # bits of one half of a number
        self.round_keys = [np.uint64(hash_words("round", key, n, number)) for number in range(FEISTEL_ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Images of int64 ``positions`` (k,), each within 0 .. n-1; (k,) int64."""
        values = self._network(positions.astype(np.uint64))
        outside = np.flatnonzero(values >= self.n)
        while len(outside):
            walked = self._network(values[outside])
            values[outside] = walked
            outside = outside[walked >= self.n]
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        half, mask = np.uint64(self.half), np.uint64((1 << self.half) - 1)
        left, right = values >> half, values & mask
        spare = np.empty_like(right)
        for key in self.round_keys:
            mixed = right + key
            _mix(mixed, spare)
            mixed &= mask
            mixed ^= left
            left, right = right, mixed
        left <<= half
        left |= right
        return left


def _mix(values: np.ndarray, spare: np.ndarray) -> None:
    """In place: each bit of the result depends on each bit of ``values`` (splitmix64's finalizer)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 0)):
        np.right_shift(values, np.uint64(shift), out=spare)
        values ^= spare
        if factor:
            values *= np.uint64(factor)
