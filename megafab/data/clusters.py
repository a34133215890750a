"""Drawing windows of a domain from a set that grows: the sampler of curriculum learning.

The windows that were admitted at one time are a cluster. A sample draws its cluster with probability
proportional to its size, so that every admitted window is equally likely; inside its cluster it is the next
of a permutation of its own, so that no window comes again before all others of the cluster have. This is the
sampler of Li et al. 2022 (arXiv 2212.03597, released code), but without files or a generator's state: which
cluster sample k of the domain draws is a hash of k, and the permutation is `order.visit`.

While all windows are admitted from the beginning there is one cluster, and an epoch visits each window once.

Shape suffix: N samples of one domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megafab.data import order
from megafab.data.mixture import occurrence


@dataclass(frozen=True, slots=True)
class Clusters:
    """The clusters of one domain: `edges[c - 1]:edges[c]` of its sorted windows; visits to each so far."""

    edges: tuple[int, ...] = ()
    visits: tuple[int, ...] = ()

    @property
    def admitted(self) -> int:
        """How many windows may be drawn."""
        return self.edges[-1] if self.edges else 0

    def admit(self, count: int) -> Clusters:
        """With the easiest `count` windows admitted, at least as many as before."""
        assert count >= self.admitted, (count, self.admitted)
        if count == self.admitted:
            return self
        return Clusters((*self.edges, count), (*self.visits, 0))

    def draw(self, seed: int, domain: str, sample_N: np.ndarray) -> tuple[Drawn, Clusters]:
        """What consecutive samples of the domain draw, and the clusters after them.

        Args:
            seed: of the order.
            domain: its name.
            sample_N: their numbers among all samples of the domain, int64.
        """
        uniform_N = order.uniform(order.stream_key(seed, "clusters", domain), sample_N)
        edges_C, visits_C = np.array(self.edges, np.int64), np.array(self.visits, np.int64)
        starts_C = np.concatenate([np.zeros(1, np.int64), edges_C[:-1]])
        # Rounding down keeps it below `admitted`: uniform numbers have no more bits than a float.
        cluster_N = np.searchsorted(edges_C, (uniform_N * self.admitted).astype(np.int64), side="right")
        drawn, which_N = np.unique(cluster_N, return_inverse=True)
        # Keyed by where it begins: a cluster keeps its order whatever comes after it.
        keys = [order.stream_key(seed, "windows", domain, start) for start in starts_C[drawn].tolist()]
        after_C = visits_C + np.bincount(cluster_N, minlength=len(edges_C))
        return Drawn(
            first_N=starts_C[cluster_N],
            size_N=(edges_C - starts_C)[cluster_N],
            visit_N=visits_C[cluster_N] + occurrence(cluster_N),
            key_N=np.array(keys, np.uint64)[which_N],
        ), Clusters(self.edges, tuple(after_C.tolist()))


@dataclass(frozen=True, slots=True)
class Drawn:
    """What samples draw: the `visit_N`-th of the `size_N` windows from `first_N` on, permuted by `key_N`."""

    first_N: np.ndarray  # int64
    size_N: np.ndarray  # int64
    visit_N: np.ndarray  # int64
    key_N: np.ndarray  # uint64

    def place(self) -> np.ndarray:
        """Which of the domain's sorted windows each sample is: int64 [N]."""
        return self.first_N + order.visit(self.visit_N, self.size_N, self.key_N)

    @staticmethod
    def gather(parts: Sequence[tuple[np.ndarray, Drawn]], among: int, chosen: np.ndarray) -> Drawn:
        """The samples `chosen` of `among`, of which each part has those at its indices."""
        whole = {
            name: np.empty(among, np.uint64 if name == "key_N" else np.int64) for name in Drawn.__slots__
        }
        for index_N, part in parts:
            for name, value in whole.items():
                value[index_N] = getattr(part, name)
        return Drawn(**{name: value[chosen] for name, value in whole.items()})
