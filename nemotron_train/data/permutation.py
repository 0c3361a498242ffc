"""Pseudo-random permutations that are pure functions of a key.

They use a fixed integer hash, not `numpy.random`, whose stream may change between NumPy versions:
a resumed run must see the same order as the first process.
"""

import hashlib

import numpy as np

from nemotron_train.config.json_text import json_text

_ROUNDS = 6  # four suffice for a pseudo-random permutation; small domains need more to mix well
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key64(*parts: int | str) -> int:
    """A 64-bit key that depends on every part and on their order."""
    digest = hashlib.blake2b(json_text(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def mix64(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): uint64 [...] → uint64 [...]."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shuffled(count: int, key: int) -> np.ndarray:
    """The numbers 0..count-1 in the order chosen by `key`: int64 [count]. O(count) memory."""
    with np.errstate(over="ignore"):
        hashes = mix64(np.uint64(key) + np.arange(count, dtype=np.uint64) * _GOLDEN)
    return np.argsort(hashes, kind="stable")


def permute(positions: np.ndarray, count: int, key: int) -> np.ndarray:
    """Map `positions` by the permutation of 0..count-1 that `key` chooses: int64 [n] → [n].

    A balanced Feistel network over the next power of two with an even exponent, applied repeatedly
    until the value is below `count` (fewer than four steps on average). O(n) memory for any
    `count`.
    """
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    round_keys = mix64(np.uint64(key) ^ (np.arange(1, _ROUNDS + 1, dtype=np.uint64) << 8))

    def network(values: np.ndarray) -> np.ndarray:
        left, right = values >> shift, values & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix64(right ^ round_key) & mask)
        return (left << shift) | right

    values = network(positions.astype(np.uint64))
    outside = np.flatnonzero(values >= count)
    while outside.size:
        values[outside] = network(values[outside])
        outside = outside[values[outside] >= count]
    return values.astype(np.int64)
