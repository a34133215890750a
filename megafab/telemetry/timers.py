"""Where the time of a step goes: named parts, measured on the host.

    timers = Timers(synchronize=torch.cuda.synchronize)
    with timers("forward_backward"):
        ...

A part costs two reads of the clock. Parts are meant to be disjoint: a part inside a part is counted in
both. On an accelerator the host runs ahead of the device, so a part would end before its work does;
while `exact` is set the end of a part waits for the device. That costs overlap, and is therefore asked for
only on steps that are logged.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter


class _Part:
    """One named part; its own context manager, so that entering it creates no object."""

    __slots__ = ("_entered", "_name", "_outer", "_timers", "lap", "total")

    def __init__(self, timers: Timers, name: str) -> None:
        self._timers, self._name = timers, name
        self._outer = timers.part
        self._entered = 0.0
        self.lap = 0.0
        self.total = 0.0

    def __enter__(self) -> None:
        self._outer, self._timers.part = self._timers.part, self._name
        self._entered = perf_counter()

    def __exit__(self, *exception: object) -> None:
        if self._timers.exact and self._timers.synchronize is not None:
            self._timers.synchronize()
        elapsed = perf_counter() - self._entered
        self.lap += elapsed
        self.total += elapsed
        self._timers.part = self._outer


class Timers:
    """Seconds spent in each part since the last `lap`, and in total.

    Attributes:
        step: the step under way, counted from 1; before the first, the last that was saved. For whoever asks
            where the run is.
        part: the innermost part under way, `other` outside of all.

    Args:
        synchronize: waits until the device has done all it was given; called at the end of a part
            while `exact` is set. None where the host does the work itself.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self.synchronize = synchronize
        self.exact = False
        self.step, self.part = 0, "other"
        self._parts: dict[str, _Part] = {}
        self._lap_started = perf_counter()

    def __call__(self, name: str) -> _Part:
        """The part called `name`, to be used in a `with` statement."""
        part = self._parts.get(name)
        if part is None:
            part = self._parts[name] = _Part(self, name)
        return part

    def lap(self) -> None:
        """Start measuring afresh, no longer exactly; totals go on."""
        self.exact = False
        self._lap_started = perf_counter()
        for part in self._parts.values():
            part.lap = 0.0

    @property
    def lap_seconds(self) -> float:
        """Wall time since the last lap, inside parts or not."""
        return perf_counter() - self._lap_started

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each part since the last lap, in the order the parts were first used."""
        return {name: part.lap for name, part in self._parts.items()}

    @property
    def totals(self) -> dict[str, float]:
        """Seconds of each part since the timers were made."""
        return {name: part.total for name, part in self._parts.items()}
