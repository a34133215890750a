"""Samples that are passed over: known to be bad, or found to be when the loss spiked over them.

A skipped sample is drawn like any other, so that its domain's count moves on, and then not read: the samples
around it are those that they were. So a run that learns in its middle what to skip is from there on the run
that was told at its beginning.

Shape suffix: G samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Skips:
    """Ranges `first:stop` of global sample numbers: ascending, disjoint and not touching."""

    ranges: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(pairs: Iterable[Sequence[int]]) -> Skips:
        """The union of ranges given as (first, count), in any order."""
        merged: list[tuple[int, int]] = []
        for first, stop in sorted((first, first + count) for first, count in pairs):
            if merged and first <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(stop, merged[-1][1])
            else:
                merged.append((first, stop))
        return Skips(tuple(merged))

    def __or__(self, other: Skips) -> Skips:
        """What either passes over."""
        return Skips.of([*self.pairs, *other.pairs])

    @property
    def pairs(self) -> list[list[int]]:
        """[first, count] of each range, as configurations and states have them."""
        return [[first, stop - first] for first, stop in self.ranges]

    def before(self, sample: int) -> Skips:
        """What is passed over of the samples before this one."""
        return Skips(tuple((first, min(stop, sample)) for first, stop in self.ranges if first < sample))

    def kept(self, first: int, count: int) -> np.ndarray:
        """The next `count` samples from `first` on that are not passed over: int64 [G], G = count."""
        pieces_G, at, left = [], first, count
        for start, stop in self.ranges:
            if at + left <= start:
                break
            if stop > at:
                run = max(0, start - at)
                pieces_G.append(np.arange(at, at + run))
                at, left = stop, left - run
        return np.concatenate([*pieces_G, np.arange(at, at + left)])


@dataclass(frozen=True, slots=True)
class Stretch:
    """Samples in a row that a step went through, those it passed over included; `counts` by domain."""

    first: int
    count: int
    counts: tuple[int, ...]
