"""A schedule to read before it is followed: its phases as a table, and its curve in characters."""

from __future__ import annotations

from collections.abc import Iterator

from megafab.optim.schedules import Schedules

_WIDTH, _HEIGHT = 60, 6  # of the curve, in characters


def lines(schedules: Schedules) -> Iterator[str]:
    """Phases with their steps and learning rates, then the learning rate over the run."""
    yield from _table(schedules)
    yield from _curve(schedules)


def _table(schedules: Schedules) -> Iterator[str]:
    rows = [("phase", "steps", "learning rate")]
    for name, first, last in schedules.phases():
        rates = f"{schedules.rate_of(first):.3g} to {schedules.rate_of(last):.3g}"
        rows.append((name, f"{first:,} to {last:,}", rates))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, steps, learning_rate in rows:
        yield f"  {name:<{widths[0]}}  {steps:<{widths[1]}}  {learning_rate}"


def _curve(schedules: Schedules) -> Iterator[str]:
    """A column for each `_WIDTH`-th of the run, a row for each `_HEIGHT`-th of the peak."""
    last = schedules.total_steps
    width = min(_WIDTH, last)
    steps = [1 + (last - 1) * column // max(1, width - 1) for column in range(width)]
    rates = [schedules.rate_of(step) for step in steps]
    peak = max(rates)
    heights = [min(_HEIGHT - 1, int(rate / peak * _HEIGHT)) for rate in rates]
    labels = {_HEIGHT - 1: f"{peak:.3g}", 0: "0"}
    margin = max(map(len, labels.values()))
    for height in reversed(range(_HEIGHT)):
        dots = "".join("*" if h == height else " " for h in heights)
        yield f"  {labels.get(height, ''):>{margin}} |{dots.rstrip()}"
    end = f"{last:,}"
    yield f"  {'':>{margin}} +{'-' * width}"
    yield f"  {'':>{margin}}  1{end:>{max(0, width - 1)}}"
