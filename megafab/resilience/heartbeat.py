"""Where a rank is, as a thread beside the loop sees it: a beat of the watchdog (`watchdog.py`).

The loop pays for none of this. The step and the part of it are attributes that it sets anyway
(`telemetry/timers.py`), the micro-batch is the engine's clock, the collectives are counted by torch in each
process group, and stacks and files are asked of the interpreter and the system when a beat is taken.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from types import FrameType
from typing import Any, NamedTuple

import torch.distributed as dist
from torch._C import _distributed_c10d

from megafab.techniques.base import Clock
from megafab.telemetry.timers import Timers
from megafab.topology.groups import Groups

Frame = tuple[str, int, str]  # file, line, function
Stack = tuple[Frame, ...]  # the outermost call first

WATCHING = "watchdog"  # what the names of threads begin with that only watch
_DEPTH = 80  # innermost calls of a stack that are kept
_PACKAGES = {"megafab", "megatron", "deepspeed"}  # whose threads are of interest
# Bytes of input and output that count as progress: more than what a run that stands still writes meanwhile (a
# progress bar), and less than the slowest disk takes in a minute.
_IO_UNIT = 1 << 24
# torch's flight recorders, the host's and that of the device where there is one. Both are on by default.
_RECORDERS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")


@dataclass(frozen=True, slots=True)
class Beat:
    """Where a rank is.

    `step` is the step under way, `part` the part of it, `micro_batch` the last one that began. `io` counts
    what the process has read and written, in units of 16 MiB. `collectives` has for each process group, by a
    name that its ranks share (`tensor/12`), how many collectives this rank has entered. `last` is the last of
    them all, told only of a rank that has not moved since its beat before. `left` says how the rank ended its
    part of the job, if it has.
    """

    host: str = ""
    step: int = 0
    part: str = "other"
    micro_batch: int = 0
    io: int = 0
    collectives: Mapping[str, int] = field(default_factory=dict[str, int])
    last: str = ""
    left: str = ""
    stacks: Mapping[str, Stack] = field(default_factory=dict[str, Stack])  # by thread, the main one first

    @property
    def progress(self) -> str:
        """What changes exactly when the rank gets on."""
        seen = self.step, self.part, self.micro_batch, self.io, self.collectives, self.left
        return json.dumps(seen)

    @property
    def waits_in(self) -> str:
        """The call between ranks that the main thread is in and who made it; empty outside of one."""
        stack = next(iter(self.stacks.values()), ())
        inside = [n for n, frame in enumerate(stack) if _communicates(frame[0])]
        if not inside:
            return ""
        callers = (shown(frame) for frame in reversed(stack[: inside[-1]]) if not _is_torch(frame[0]))
        return f"{stack[inside[-1]][2]}, called by {next(callers, 'nobody')}"

    def where(self) -> str:
        """The place in one line."""
        if not self.step:
            return "the start, before a step"
        return f"step {self.step}, {self.part}, micro-batch {self.micro_batch}"

    def to_text(self) -> str:
        """All of it."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_text(text: bytes) -> Beat:
        """What `to_text` made."""
        values: dict[str, Any] = json.loads(text)
        stacks = {thread: tuple(map(tuple, stack)) for thread, stack in values.pop("stacks").items()}
        return Beat(**values, stacks=stacks)


class Pulse(NamedTuple):
    """What of a beat is looked at each time: its number, whether the rank is at its end, its progress."""

    number: int
    finished: bool
    progress: str

    def to_text(self) -> str:
        """All of it."""
        return f"{self.number} {self.finished:d} {self.progress}"

    @staticmethod
    def from_text(text: bytes) -> Pulse:
        """What `to_text` made."""
        number, finished, progress = text.decode().split(" ", 2)
        return Pulse(int(number), finished == "1", progress)


class Heart:
    """Takes the beats of this rank.

    Args:
        timers: know the step and its part.
        clock: knows the micro-batch.
        groups: whose collectives are counted.
    """

    def __init__(self, timers: Timers, clock: Clock, groups: Groups) -> None:
        self._timers, self._clock = timers, clock
        self._host = socket.gethostname()
        self._groups = {f"{axis}/{group.group_name}": group for axis, group in groups.collective().items()}
        self._axes: dict[str, str] = {g.group_name: axis for axis, g in groups.collective().items()}
        self._progress = ""

    def beat(self, left: str = "") -> Beat:
        """Where the rank is now; `left` once it has ended its part."""
        beat = Beat(
            host=self._host,
            step=self._timers.step,
            part=self._timers.part,
            micro_batch=self._clock.micro_batch,
            io=_io(),
            collectives={name: _entered(group) for name, group in self._groups.items()},
            left=left,
            stacks=dict(_stacks()),
        )
        stands = beat.progress == self._progress
        self._progress = beat.progress
        # Reading the recorder takes some 50 ms, which a rank that stands still has.
        return dataclasses.replace(beat, last=_last_collective(self._axes)) if stands else beat


def shown(frame: Frame) -> str:
    """A frame in a line: function (file:line), the file without what stands before its package."""
    file, line, function = frame
    return f"{function} ({'/'.join(PurePath(file).parts[-3:])}:{line})"


def _entered(group: dist.ProcessGroup) -> int:
    """How many collectives of a group this rank has entered: torch's own counter, of gloo and NCCL alike."""
    return group._get_sequence_number_for_group()  # pyright: ignore[reportAttributeAccessIssue]


def _stacks() -> Iterator[tuple[str, Stack]]:
    """The main thread's, and those of others that run this code and do not only watch."""
    frames, main = sys._current_frames(), threading.main_thread().ident
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident in sorted(frames, key=lambda ident: ident != main):
        stack, name = _stack(frames[ident]), names.get(ident, f"thread {ident}")
        if ident == main or (_is_ours(stack) and not name.startswith(WATCHING)):
            yield name, stack


def _is_ours(stack: Stack) -> bool:
    return any(_PACKAGES & set(PurePath(file).parts) for file, _, _ in stack)


def _stack(frame: FrameType | None) -> Stack:
    """Without the source of the lines, which would be read from a disk that may be what hangs."""
    stack: list[Frame] = []
    while frame is not None and len(stack) < _DEPTH:
        stack.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return tuple(reversed(stack))


def _communicates(file: str) -> bool:
    return file.endswith(("torch/distributed/distributed_c10d.py", "pipeline_parallel/p2p_communication.py"))


def _is_torch(file: str) -> bool:
    return "torch" in PurePath(file).parts


def _io() -> int:
    """What this process has read and written by system calls: saving and restoring move nothing else.

    Linux counts it; elsewhere it is 0, and `resilience.stall_seconds` must be longer than a save.
    """
    try:
        with open("/proc/self/io") as file:
            read, written = (int(next(file).split()[1]) for _ in range(2))
    except OSError:
        return 0
    return (read + written) // _IO_UNIT


def _last_collective(axes: Mapping[str, str]) -> str:
    """The last collective that this rank entered, as torch's flight recorder has it; empty without one."""
    entries: list[dict[str, Any]] = []
    for name in _RECORDERS:
        dump = getattr(_distributed_c10d, name, None)
        if dump is not None:
            entries += json.loads(dump()).get("entries", [])
    if not entries:
        return ""
    last = max(entries, key=lambda entry: entry["time_created_ns"])
    name, described = last["process_group"]
    done = "finished" if last["retired"] else "not finished"
    what = f"{last['profiling_name']} {last['collective_seq_id']} of {axes.get(name, described)}"
    return f"{what}, {last['input_sizes']}, {done}"
