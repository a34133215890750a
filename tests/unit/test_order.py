"""The order of samples: bijections, epochs, and values that no later change may move."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from megafab.data.order import permute, random_bits, stream_key, uniform, visit

WORD = 2**64 - 1


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def scalar_bits(key: int, counter: int) -> int:
    return mix((key + (counter + 1) * 0x9E3779B97F4A7C15) & WORD)


def scalar_permute(index: int, size: int, key: int) -> int:
    """The swap-or-not shuffle as its paper writes it, on Python integers."""
    for turn in range(24):
        round_key = scalar_bits(key, turn)
        partner = (round_key % size - index) % size
        if mix(round_key ^ max(index, partner)) >> 63:
            index = partner
    return index


def one_key(*parts: str | int) -> np.ndarray:
    return np.array([stream_key(*parts)], np.uint64)


def test_random_bits_are_splitmix64():
    # The first outputs of the reference implementation of SplitMix64 for the seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert random_bits(np.array([1234567], np.uint64), np.arange(3)).tolist() == expected


def test_uniform_depends_on_the_counter_alone_and_fills_the_unit_interval():
    key = stream_key(7, "mixture")
    whole = uniform(key, np.arange(40_000))
    assert np.array_equal(whole[17_000:17_100], uniform(key, np.arange(17_000, 17_100)))
    assert whole.min() >= 0
    assert whole.max() < 1
    counts = np.bincount((whole * 100).astype(int), minlength=100)
    chi_square = ((counts - 400) ** 2 / 400).sum()
    assert chi_square < 99 + 4 * np.sqrt(2 * 99)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 1000, 4097])
def test_permutation_is_a_bijection(size: int):
    for seed in range(3):
        image = permute(np.arange(size), np.array([size]), one_key(seed, "books"))
        assert np.array_equal(np.sort(image), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 3 * 10**12])
def test_permutation_equals_the_scalar_one(size: int):
    key = stream_key(1234, "books")
    index = np.unique(np.linspace(0, size - 1, 50).astype(np.int64))
    expected = [scalar_permute(int(i), size, key) for i in index]
    assert permute(index, np.array([size]), np.array([key], np.uint64)).tolist() == expected


def test_each_index_may_have_its_own_size_and_key():
    index, size = np.array([0, 4, 999, 0]), np.array([1, 5, 1000, 7])
    key = random_bits(one_key(1), np.arange(4))
    together = permute(index, size, key)
    alone = [permute(index[[i]], size[[i]], key[[i]])[0] for i in range(4)]
    assert together.tolist() == alone


@pytest.mark.parametrize("size", [2, 3, 4])
def test_small_permutations_are_uniform(size: int):
    keys = random_bits(one_key("small"), np.arange(12_000))
    images = permute(np.tile(np.arange(size), len(keys)), np.array([size]), np.repeat(keys, size))
    found = Counter(map(tuple, images.reshape(-1, size).tolist()))
    possible = list(permutations(range(size)))
    mean = len(keys) / len(possible)
    chi_square = sum((found[image] - mean) ** 2 / mean for image in possible)
    freedom = len(possible) - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_large_permutations_look_random():
    size = 4097
    index = np.arange(size)
    image = permute(index, np.array([size]), one_key(3))
    # A random permutation has these correlations within 1/sqrt(n), and one fixed point on average.
    assert abs(np.corrcoef(index, image)[0, 1]) < 4 / np.sqrt(size)
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 4 / np.sqrt(size)
    assert (index == image).sum() <= 6
    # Neighbours stay neighbours 2 times in n.
    assert (np.abs(np.diff(image)) == 1).sum() <= 9


def test_every_epoch_visits_each_item_once_in_another_order():
    size = 1000
    key = one_key(5, "books")
    visits = visit(np.arange(4 * size), np.array([size]), key).reshape(4, size)
    assert np.array_equal(np.sort(visits, axis=1), np.tile(np.arange(size), (4, 1)))
    for first in range(4):
        for second in range(first):
            # Two independent permutations agree in one place on average.
            assert (visits[first] == visits[second]).sum() <= 7


def test_order_depends_on_seed_and_name():
    size = np.array([1000])
    base = permute(np.arange(1000), size, one_key(1, "books"))
    for other in (one_key(2, "books"), one_key(1, "code"), one_key(12, "books"), one_key(1, "2books")):
        assert (permute(np.arange(1000), size, other) == base).sum() <= 7


def test_keys_keep_their_parts_apart():
    assert stream_key(1, "2a") != stream_key(12, "a")
