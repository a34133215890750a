"""Counter-based random numbers and permutations: where the order of samples comes from.

Nothing here has a state. A draw is a hash of (key, counter) and an epoch's order is a keyed permutation
that is evaluated one index at a time, so the millionth sample costs what the first does, a resumed run
needs only its counters, and no table of indices is ever built, stored or sent to another rank.

Changing any constant here changes the order of every run and breaks the exact resume of older ones;
`tests/unit/test_order.py` holds an independent scalar version of the same arithmetic.

Shape suffix: N any number of counters.
"""

from __future__ import annotations

import hashlib

import numpy as np

# SplitMix64 (Steele, Lea, Flood 2014): a Weyl increment and a finaliser that mixes all 64 bits.
_WEYL = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

# After r rounds an index that no round has moved yet is left with probability 2^-r.
_ROUNDS = 24


def stream_key(*parts: str | int) -> int:
    """A 64-bit key for the stream of random numbers named by `parts`, such as a seed, a purpose, a domain.

    Names are hashed, not numbered, so that a domain keeps its order when others are added or removed.
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def random_bits(key_N: np.ndarray, counter_N: np.ndarray) -> np.ndarray:
    """64 random bits (uint64 [N]) for each pair of a uint64 key and a counter; either may broadcast."""
    x = np.asarray(key_N, np.uint64) + (np.asarray(counter_N, np.uint64) + np.uint64(1)) * _WEYL
    return _mix(x)


def uniform(key: int, counter_N: np.ndarray) -> np.ndarray:
    """Uniform float64 [N] in [0, 1), one for each counter, with 53 random bits."""
    key_1 = np.array([key], np.uint64)
    return (random_bits(key_1, counter_N) >> np.uint64(11)) * 2.0**-53


def permute(index_N: np.ndarray, size_N: np.ndarray, key_N: np.ndarray) -> np.ndarray:
    """Where a random permutation of `range(size)`, chosen by `key`, sends each index: int64 [N].

    The swap-or-not shuffle (Hoang, Morris, Rogaway 2012). Each round pairs every x with pivot - x modulo
    the size and swaps the pair or not by a coin that both of its members compute alike; so each round,
    and with it the whole, is a bijection for every size >= 1. Unlike a Feistel network it needs no power
    of two to walk back from, and for small sizes it still reaches every permutation.

    Args:
        index_N: 0 <= index < size.
        size_N: at least 1 each; may broadcast.
        key_N: uint64; may broadcast.
    """
    x = np.array(index_N, np.uint64, ndmin=1)
    size = np.asarray(size_N, np.uint64)
    for turn in range(_ROUNDS):
        round_key = random_bits(key_N, np.array([turn], np.uint64))
        pivot = round_key % size
        partner = np.where(pivot >= x, pivot - x, pivot + size - x)
        swap = _mix(round_key ^ np.maximum(x, partner)) >> np.uint64(63) == 1
        x = np.where(swap, partner, x)
    return x.astype(np.int64)


def visit(index_N: np.ndarray, size_N: np.ndarray, key_N: np.ndarray) -> np.ndarray:
    """Which of `size` items the `index`-th visit is to, when every epoch visits each once: int64 [N].

    The epoch is `index // size`, and each epoch has a permutation of its own.
    """
    epoch_N, inside_N = np.divmod(np.asarray(index_N, np.int64), size_N)
    return permute(inside_N, size_N, random_bits(key_N, epoch_N))


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))
