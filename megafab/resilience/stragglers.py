"""Which ranks are slow: every rank waits for the slowest, and its step time does not say for whom.

In a synchronous job all ranks have the same step time. So every so many steps each rank measures, by itself,
what it does without the others: a small fixed computation, of which the fastest of several goes counts, and
the time it has waited for its data since the last time. The ranks exchange both over the host's
network. A rank that is so many times slower than the median rank, twice in a row, is told: once may be
another process on the machine.

The computation is a product of constant matrices of its own: it draws no random number and touches nothing
of the training.
"""

from __future__ import annotations

import socket
import statistics
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from megafab.platform import platform
from megafab.telemetry.timers import Timers
from megafab.topology.groups import Groups

_GOES = 7  # of the computation, after one that does not count
# (rows, products): a millisecond or less, and long on an accelerator against the start of a kernel.
_ON_HOST, _ON_DEVICE = (256, 1), (2048, 8)
# Waiting for data is slow from this share of all time on; below it, its ratio to the median means nothing.
_DATA_SHARE = 0.05
_COMPUTING, _WAITING = "computes", "waits for data"


class Stragglers:
    """Compares the speed of the ranks, which is a collective over the job.

    Args:
        every: steps between two comparisons; 0: never.
        ratio: times slower than the median rank.
        groups: this rank's place.
        timers: know the time spent on data.
        message: shows one line to the user.
        compute: the computation, finished when it returns; None: the product of matrices on the device.
    """

    def __init__(
        self,
        every: int,
        ratio: float,
        *,
        groups: Groups,
        timers: Timers,
        message: Callable[[str], None],
        compute: Callable[[], object] | None = None,
    ) -> None:
        self._every = every if groups.mesh.ranks > 1 else 0
        self._ratio, self._groups, self._timers, self._message = ratio, groups, timers, message
        self._compute = compute or (_product() if self._every else lambda: None)
        self._suspects: set[tuple[str, int]] = set()  # slow the last time: what, rank
        self._told: set[tuple[str, int]] = set()
        self._since, self._data = perf_counter(), 0.0
        self._numbers: dict[str, Any] = {}

    def compare(self, step: int) -> None:
        """Compare the ranks after `step`, if that is due; tell of those that are slow again."""
        if not self._every or step % self._every:
            return
        found: list[Any] = [None] * self._groups.mesh.ranks
        mine = socket.gethostname(), self._computing(), self._waiting()
        dist.all_gather_object(found, mine, group=self._groups.host)
        hosts, computing, waiting = zip(*found, strict=True)
        slow = {
            (what, rank): times
            for what, times_of in (
                (_COMPUTING, slower(computing, self._ratio)),
                (_WAITING, slower(waiting, self._ratio, least=_DATA_SHARE)),
            )
            for rank, times in times_of.items()
        }
        confirmed = slow.keys() & self._suspects
        for what, rank in sorted(confirmed - self._told):
            self._message(
                f"straggler: rank {rank} on {hosts[rank]} {what} {slow[what, rank]:.1f} times as long as the "
                f"median rank, twice in a row"
            )
        self._suspects, self._told = set(slow), set(confirmed)
        slowest = max(range(len(computing)), key=computing.__getitem__)
        self._numbers = {
            "slowest_rank": slowest,
            "slowest_ratio": computing[slowest] / statistics.median_low(computing),
            "data_share": max(waiting),
            "count": len({rank for _, rank in confirmed}),
        }

    def numbers(self) -> Mapping[str, Mapping[str, Any]]:
        """The last comparison under `stragglers`, for a row of the metrics; nothing the second time."""
        numbers, self._numbers = self._numbers, {}
        return {"stragglers": numbers} if numbers else {}

    def _computing(self) -> float:
        """Seconds of the fastest go."""
        self._compute()
        seconds: list[float] = []
        for _ in range(_GOES):
            begin = perf_counter()
            self._compute()
            seconds.append(perf_counter() - begin)
        return min(seconds)

    def _waiting(self) -> float:
        """The share of the time since the last comparison that this rank has waited for data."""
        now, data = perf_counter(), self._timers.totals.get("data", 0.0)
        share = (data - self._data) / (now - self._since)
        self._since, self._data = now, data
        return share


def slower(values: Sequence[float], ratio: float, *, least: float = 0.0) -> dict[int, float]:
    """The ranks whose value is more than `ratio` times the median, and at least `least`; how many times.

    Of an even number of ranks the lower median counts, so that one of two can be slow.
    """
    median = statistics.median_low(values)
    return {
        rank: value / max(median, 1e-9)
        for rank, value in enumerate(values)
        if value > ratio * median and value >= least
    }


def _product() -> Callable[[], None]:
    rows, products = _ON_DEVICE if platform.is_cuda else _ON_HOST
    dtype = torch.bfloat16 if platform.is_cuda else torch.float32
    matrix = torch.full((rows, rows), 1.0 / rows, dtype=dtype, device=platform.device)
    result = torch.empty_like(matrix)

    def compute() -> None:
        for _ in range(products):
            torch.mm(matrix, matrix, out=result)
        platform.synchronize()

    return compute
