"""Whether a job stands still and which rank is to blame: what the watchdog concludes from beats.

In training all ranks wait for each other within a step, so that one that hangs soon stops them all. The job
stands still when nobody gets on; the rank to blame is found in this order:

1. ranks that have left while the others train, and ranks that have fallen silent: stopped, swapped out, on a
   dead node;
2. ranks that others wait for in a collective, and that wait for nobody themselves. A rank waits for those
   members of a group that have entered fewer of its collectives. Along such waits one comes from any rank to
   the one that began it;
3. ranks that are outside of communication while most are in it;
4. ranks in another part of the step than most.

Where none of this holds they wait alike, and that is what is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megafab.errors import UserError
from megafab.resilience.heartbeat import Beat, Pulse, shown


class Vigil:
    """How long nobody has got on, and how long each rank has been silent.

    Only time that the watcher has itself lived through counts: where it was stopped between two looks, with
    the whole job in a debugger or asleep with the machine, it begins afresh.

    Args:
        stall_seconds: without progress, the job stands still.
        interval: seconds between two looks, and between two beats.
    """

    def __init__(self, stall_seconds: float, interval: float) -> None:
        self._stall_seconds = stall_seconds
        self._patience = 3 * interval  # a beat may be late, and seen late
        self._looked: float | None = None
        self._pulses: dict[int, Pulse] = {}
        self._heard: dict[int, float] = {}  # when each rank's last beat came
        self._moved = 0.0  # when the progress of any last changed

    def look(self, now: float, pulses: Mapping[int, Pulse]) -> None:
        """Take what there is at `now`, in seconds that only grow."""
        if self._looked is None or now - self._looked > self._patience:
            self._heard, self._moved = dict.fromkeys(pulses, now), now
        self._looked = now
        for rank, pulse in pulses.items():
            before = self._pulses.get(rank, pulse)
            if pulse.number != before.number:
                self._heard[rank] = now
            if pulse.progress != before.progress:
                self._moved = now
        self._pulses.update(pulses)

    @property
    def still(self) -> float:
        """Seconds since any rank got on."""
        return 0.0 if self._looked is None else self._looked - self._moved

    @property
    def silent(self) -> dict[int, float]:
        """Seconds since the last beat of each rank that has missed several."""
        if self._looked is None:
            return {}
        ages = {rank: self._looked - heard for rank, heard in self._heard.items()}
        return {rank: age for rank, age in ages.items() if age > self._patience}

    @property
    def stalled(self) -> bool:
        """Whether the job stands still.

        A rank's silence is no proof, since its thread may have died where training has not; but where that
        has lasted long enough, the others' standstill need not have.
        """
        silence = max(self.silent.values(), default=0.0)
        return self.still > self._stall_seconds or (
            silence > self._stall_seconds and self.still > self._patience
        )


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Which ranks are to blame, and the line for the user; no ranks where all wait alike."""

    ranks: tuple[int, ...]
    line: UserError


def diagnose(
    beats: Mapping[int, Beat], silent: Mapping[int, float], *, still: float, stall_seconds: float
) -> Diagnosis:
    """The ranks that hold the job up.

    Args:
        beats: the last of each rank.
        silent: seconds since then of those that send no more.
        still: seconds without progress.
        stall_seconds: what was allowed.
    """
    others = {rank: beat for rank, beat in beats.items() if rank not in silent and not beat.left}
    finders: Sequence[Callable[[], dict[int, str]]] = (
        lambda: _left(beats),
        lambda: {rank: _silence(beats[rank], age) for rank, age in silent.items()},
        lambda: _behind(others),
        lambda: _elsewhere(others),
        lambda: _in_another_part(others),
    )
    found = next(filter(None, (find() for find in finders)), {})
    expected = f"progress within resilience.stall_seconds={stall_seconds:g}"
    again = "run the same command to go on from the last checkpoint"
    if found:
        first, *rest = ranks = sorted(found)
        hosts = sorted({beats[rank].host for rank in ranks})
        where = f"{_ranks(ranks)} on {', '.join(hosts)}"
        more = f" (so rank {first}; of the others the report tells)" if rest else ""
        fix = (
            f"{again}, without {', '.join(hosts)} if it happens there again; if it was only slow, raise "
            "resilience.stall_seconds"
        )
        return Diagnosis(tuple(ranks), UserError(where, found[first] + more, expected, fix))
    where = f"all {len(beats)} ranks" if len(beats) > 1 else f"rank 0 on {beats[0].host}"
    fix = f"{again}; if it happens again, look at the network and the disks that all ranks share"
    return Diagnosis((), UserError(where, _alike(beats, still), expected, fix))


def report(
    beats: Mapping[int, Beat], silent: Mapping[int, float], diagnosis: Diagnosis, *, still: float
) -> Iterator[str]:
    """Lines for a file: the diagnosis, then where every rank is, ranks with the same stacks together."""
    yield f"No progress for {still:.1f} s."
    yield str(diagnosis.line)
    alike: dict[tuple[object, ...], list[int]] = {}
    for rank, beat in sorted(beats.items(), key=lambda pair: (pair[0] not in diagnosis.ranks, pair[0])):
        alike.setdefault((rank in diagnosis.ranks, tuple(beat.stacks.items())), []).append(rank)
    for ranks in alike.values():
        yield ""
        yield f"{_ranks(ranks)}:"
        for rank in ranks:
            yield f"  rank {rank} on {beats[rank].host}: {state(beats[rank], silent.get(rank))}"
        yield from stacks(beats[ranks[0]])


def state(beat: Beat, silent: float | None) -> str:
    """Where a rank is, or was when last heard of, and what it has entered of each group's collectives."""
    heard = "" if silent is None else f", last heard of {silent:.1f} s ago"
    entered = ", ".join(f"{name} {count}" for name, count in beat.collectives.items() if count)
    return "; ".join(
        [
            (beat.left or beat.where()) + heard,
            *([f"collectives entered: {entered}"] if entered else []),
            *([f"the last: {beat.last}"] if beat.last else []),
        ]
    )


def stacks(beat: Beat) -> Iterator[str]:
    """The Python stacks of a rank, as tracebacks have them."""
    for thread, frames in beat.stacks.items():
        yield f"  {thread} (most recent call last):"
        for file, line, function in frames:
            yield f'    File "{file}", line {line}, in {function}'


def _left(beats: Mapping[int, Beat]) -> dict[int, str]:
    return {rank: beat.left for rank, beat in beats.items() if beat.left}


def _silence(beat: Beat, age: float) -> str:
    return (
        f"no sign of life for {age:.1f} s (stopped, swapped out, on a dead node, or in a call that holds the "
        f"interpreter); it was at {beat.where()}"
    )


def _behind(beats: Mapping[int, Beat]) -> dict[int, str]:
    """Those that others wait for in a collective, and who wait for nobody; what they have not entered.

    Where each of them waits for another, they have entered collectives in different orders: all of them.
    """
    waiting: set[int] = set()
    missing: dict[int, str] = {}
    for group in dict.fromkeys(name for beat in beats.values() for name in beat.collectives):
        entered = {rank: beat.collectives[group] for rank, beat in beats.items() if group in beat.collectives}
        least, most = min(entered.values()), max(entered.values())
        waiting |= {rank for rank, count in entered.items() if count > least}
        ahead = sorted(rank for rank, count in entered.items() if count == most)
        call = beats[ahead[0]].waits_in
        have = f"which {_ranks(ahead)} {'has' if len(ahead) == 1 else 'have'}{f', in {call}' if call else ''}"
        for rank, count in entered.items():
            if count < most:
                missing.setdefault(rank, f"collective {count + 1} of {group} not entered, {have}")
    first = [rank for rank in missing if rank not in waiting] or list(missing)
    # Who waits for a message between stages, which is not counted, is not where it began.
    outside = [rank for rank in first if not beats[rank].waits_in]
    return {rank: f"{missing[rank]}; it is {_place(beats[rank])}" for rank in outside or first}


def _elsewhere(beats: Mapping[int, Beat]) -> dict[int, str]:
    """Those outside of communication while the others, at least as many, are in it."""
    outside = {rank: beat for rank, beat in beats.items() if not beat.waits_in}
    if not 0 < len(outside) <= len(beats) / 2:
        return {}
    inside = next(beat.waits_in for beat in beats.values() if beat.waits_in)
    return {rank: f"it {_place(beat)} while others are in {inside}" for rank, beat in outside.items()}


def _in_another_part(beats: Mapping[int, Beat]) -> dict[int, str]:
    """Those in another part of the step than most."""
    parts = {rank: (beat.step, beat.part) for rank, beat in beats.items()}
    (most, count), *_ = Counter(parts.values()).most_common(1)
    if not len(beats) / 2 < count < len(beats):
        return {}
    step, part = most
    return {
        rank: f"it {_place(beat)} while most are at step {step}, {part}"
        for rank, beat in beats.items()
        if parts[rank] != most
    }


def _alike(beats: Mapping[int, Beat], still: float) -> str:
    """What all of them do, as the first shows it."""
    first = beats[min(beats)]
    alike = ", all alike" if len(beats) > 1 else ""
    call = f", in {first.waits_in}" if first.waits_in else ""
    return f"no progress for {still:.1f} s{alike}: {_place(first)}{call}"


def _place(beat: Beat) -> str:
    stack = next(iter(beat.stacks.values()), ())
    at = f" in {shown(stack[-1])}" if stack else ""
    return f"at {beat.where()}{at}"


def _ranks(ranks: Sequence[int]) -> str:
    """Ascending ranks in words: `rank 3`, `ranks 0 to 4, 6`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    shown = (f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(shown)
