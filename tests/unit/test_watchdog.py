"""What the watchdog concludes: when a job stands still, which rank is to blame, what is said of it."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from megafab.resilience.diagnosis import Vigil, diagnose, report
from megafab.resilience.heartbeat import Beat, Heart, Pulse, Stack
from megafab.resilience.stragglers import slower
from megafab.resilience.watchdog import interval_of
from megafab.run import StepPlan
from megafab.techniques.base import Clock
from megafab.telemetry.timers import Timers

FIT = ("/home/megafab/train.py", 50, "fit")
REDUCES: Stack = (
    *(FIT, ("/lib/megatron/core/tensor_parallel/mappings.py", 30, "_reduce")),
    *(("/lib/torch/distributed/c10d_logger.py", 83, "wrapper"),),
    *(("/lib/torch/distributed/distributed_c10d.py", 3053, "all_reduce"),),
)
RECEIVES: Stack = (FIT, ("/lib/megatron/core/pipeline_parallel/p2p_communication.py", 200, "recv_forward"))
READS: Stack = (FIT, ("/home/megafab/data/loader.py", 120, "take"))
COMPUTES: Stack = (FIT, ("/home/megafab/model/gpt.py", 7, "forward"))
IN_REDUCE = "all_reduce, called by _reduce (core/tensor_parallel/mappings.py:30)"
NORMAL = Beat("n0", 7, "forward_backward", 2, collectives={"host/0": 9}, stacks={"MainThread": REDUCES})
READING = "at step 7, forward_backward, micro-batch 2 in take (megafab/data/loader.py:120)"


def beat(stack: Stack = REDUCES, host: str = "n0", **changes) -> Beat:
    return dataclasses.replace(NORMAL, host=host, stacks={"MainThread": stack}, **changes)


def counted(stack: Stack, host: str = "n0", **collectives: int) -> Beat:
    return beat(stack, host, collectives=collectives)


# name: (beats, silent, ranks, where, what was found)
CASES: dict[str, tuple[list[Beat], Mapping[int, float], tuple[int, ...], str, str]] = {
    "stopped": (
        *([beat(), beat(), beat(COMPUTES, "n1"), beat()], {2: 63.25}, (2,), "rank 2 on n1"),
        "no sign of life for 63.2 s (stopped, swapped out, on a dead node, or in a call that holds the "
        "interpreter); it was at step 7, forward_backward, micro-batch 2",
    ),
    "left with an error": (
        [beat(), beat(left="that it left the job with OSError"), beat()],
        {1: 70.0},
        *((1,), "rank 1 on n0", "that it left the job with OSError"),
    ),
    "behind": (
        [counted(REDUCES, tensor=8), counted(READS, tensor=7), counted(REDUCES, tensor=8)],
        *({}, (1,), "rank 1 on n0"),
        f"collective 8 of tensor not entered, which ranks 0, 2 have, in {IN_REDUCE}; it is {READING}",
    ),
    # 3 waits for 1 along the data axis, but 1 itself waits for 0.
    "behind, with others in its wake": (
        [
            *(counted(READS, "n0", t0=7, d0=3), counted(REDUCES, "n0", t0=8, d1=3)),
            *(counted(REDUCES, "n1", t1=8, d0=4), counted(REDUCES, "n1", t1=8, d1=4)),
        ],
        *({}, (0,), "rank 0 on n0"),
        f"collective 8 of t0 not entered, which rank 1 has, in {IN_REDUCE}; it is {READING}",
    ),
    # 0 is stuck in the first stage, 2 waits for what it should send; 1 and 3 wait for them along data.
    "behind, and its next stage": (
        [
            *(counted(READS, d0=3), counted(REDUCES, d0=4)),
            *(counted(RECEIVES, "n1", d1=3), counted(REDUCES, "n1", d1=4)),
        ],
        *({}, (0,), "rank 0 on n0"),
        f"collective 4 of d0 not entered, which rank 1 has, in {IN_REDUCE}; it is {READING}",
    ),
    "waiting for each other": (
        [counted(REDUCES, a=2, b=1), counted(REDUCES, "n1", a=1, b=2)],
        *({}, (0, 1), "ranks 0, 1 on n0, n1"),
        f"collective 2 of b not entered, which rank 1 has, in {IN_REDUCE}; it is at step 7, "
        "forward_backward, micro-batch 2 in all_reduce (torch/distributed/distributed_c10d.py:3053) "
        "(so rank 0; of the others the report tells)",
    ),
    "outside of communication": (
        [beat(RECEIVES), beat(READS), beat(RECEIVES), beat(RECEIVES)],
        *({}, (1,), "rank 1 on n0"),
        f"it {READING} while others are in recv_forward, called by fit (home/megafab/train.py:50)",
    ),
    "in another part": (
        [beat(COMPUTES), beat(COMPUTES), beat(COMPUTES, part="data", step=8)],
        *({}, (2,), "rank 2 on n0"),
        "it at step 8, data, micro-batch 2 in forward (megafab/model/gpt.py:7) while most are at step 7, "
        "forward_backward",
    ),
    "all alike": (
        *([beat() for _ in range(4)], {}, (), "all 4 ranks"),
        "no progress for 70.0 s, all alike: at step 7, forward_backward, micro-batch 2 in all_reduce "
        f"(torch/distributed/distributed_c10d.py:3053), in {IN_REDUCE}",
    ),
    "alone, restoring": (
        *([beat(READS, step=0)], {}, (), "rank 0 on n0"),
        "no progress for 70.0 s: at the start, before a step in take (megafab/data/loader.py:120)",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_rank_to_blame(name: str):
    beats, silent, ranks, where, found = CASES[name]
    said = diagnose(dict(enumerate(beats)), silent, still=70.0, stall_seconds=60.0)
    assert (said.ranks, said.line.where, said.line.found) == (ranks, where, found)
    assert said.line.expected == "progress within resilience.stall_seconds=60"
    assert said.line.fix.startswith("run the same command to go on from the last checkpoint")


def test_the_report_joins_ranks_with_the_same_stacks():
    beats = {rank: beat() for rank in range(6)} | {3: beat(READS, last="gloo:barrier 4 of host")}
    said = diagnose(beats, {3: 66.0}, still=70.0, stall_seconds=60.0)
    lines = list(report(beats, {3: 66.0}, said, still=70.0))
    assert [line for line in lines if line.startswith("rank") and line.endswith(":")] == [
        "rank 3:",
        "ranks 0 to 2, 4, 5:",
    ]
    assert (
        "  rank 3 on n0: step 7, forward_backward, micro-batch 2, last heard of 66.0 s ago; collectives "
        "entered: host/0 9; the last: gloo:barrier 4 of host"
    ) in lines
    assert lines.count('    File "/home/megafab/train.py", line 50, in fit') == 2


# -- when --------------------------------------------------------------------------------------------------


class Watched:
    """Ranks that a vigil of 6 s looks at once a second, in time that passes when told to."""

    def __init__(self, ranks: int = 3) -> None:
        self.vigil, self.now = Vigil(6.0, 1.0), 100.0
        self.pulses = {rank: Pulse(1, False, "") for rank in range(ranks)}

    def pass_(self, seconds: int, *, beating: set[int], moving: set[int] = frozenset()) -> Vigil:  # type: ignore[assignment]
        for _ in range(seconds):
            self.now += 1.0
            for rank in beating:
                number, finished, progress = self.pulses[rank]
                self.pulses[rank] = Pulse(number + 1, finished, progress + "." * (rank in moving))
            self.vigil.look(self.now, self.pulses)
        return self.vigil


ALL = {0, 1, 2}


def test_nobody_moves():
    watched = Watched()
    assert not watched.pass_(20, beating=ALL, moving={1}).stalled
    assert not watched.pass_(6, beating=ALL).stalled
    assert watched.pass_(1, beating=ALL).stalled
    assert (watched.vigil.still, watched.vigil.silent) == (7.0, {})
    assert not watched.pass_(1, beating=ALL, moving={2}).stalled


def test_a_silent_rank_stalls_the_job_as_soon_as_the_others_have_run_into_it():
    watched = Watched()
    watched.pass_(1, beating=ALL, moving=ALL)
    assert not watched.pass_(3, beating={0, 1}, moving={0, 1}).stalled  # a step's worth of work
    assert not watched.pass_(3, beating={0, 1}).stalled
    assert watched.pass_(1, beating={0, 1}).stalled
    assert watched.vigil.silent == {2: 7.0}


def test_silence_alone_is_no_stall():
    watched = Watched()
    watched.pass_(1, beating=ALL, moving=ALL)
    assert not watched.pass_(50, beating={0, 1}, moving={0, 1}).stalled


def test_a_late_beat_is_no_silence():
    watched = Watched()
    watched.pass_(1, beating=ALL, moving=ALL)
    assert watched.pass_(3, beating={0, 1}, moving={0, 1}).silent == {}


def test_a_watcher_that_was_stopped_itself_begins_afresh():
    watched = Watched()
    watched.pass_(5, beating=ALL)
    watched.now += 3600.0  # the whole job in a debugger
    assert not watched.pass_(1, beating=set()).stalled
    assert not watched.pass_(6, beating=ALL).stalled
    assert watched.pass_(1, beating=ALL).stalled


@pytest.mark.parametrize(("stall_seconds", "seconds"), [(600.0, 30.0), (60.0, 10.0), (0.5, 0.2)])
def test_beats_are_few(stall_seconds: float, seconds: float):
    assert interval_of(stall_seconds) == seconds


# -- beats -------------------------------------------------------------------------------------------------


class Alone:
    """The groups of a job of one rank."""

    def collective(self) -> dict:
        return {}


def test_a_beat_says_where_the_rank_is(tmp_path: Path):
    timers, clock = Timers(), Clock()
    heart = Heart(timers, clock, Alone())  # type: ignore[arg-type]
    assert heart.beat().where() == "the start, before a step"
    timers.step, clock.micro_batch = 3, 2
    clock.plan = StepPlan(2, 0.1, 0.0, 2, 2, 1, 4, (1.0,))
    with timers("evaluate"):
        with timers("data"):
            assert heart.beat().where() == "step 3, data, micro-batch 2"
        within = heart.beat()
    assert within.where() == "step 3, evaluate, micro-batch 2"
    assert heart.beat().part == "other"
    assert (__file__, "test_a_beat_says_where_the_rank_is") in [
        (file, function) for file, _, function in within.stacks["MainThread"]
    ]
    assert Beat.from_text(within.to_text().encode()) == within
    pulse = Pulse(7, True, within.progress)
    assert Pulse.from_text(pulse.to_text().encode()) == pulse


def test_input_and_output_are_progress(tmp_path: Path):
    if not os.path.exists("/proc/self/io"):
        pytest.skip("this system does not count input and output")
    heart = Heart(Timers(), Clock(), Alone())  # type: ignore[arg-type]
    before = heart.beat().progress
    (tmp_path / "a file").write_bytes(bytes(17 << 20))
    assert heart.beat().progress != before
    still = heart.beat().progress
    (tmp_path / "a line").write_text("what a run that stands still writes\n" * 1000)
    assert heart.beat().progress == still


def test_threads_that_run_this_code_are_shown():
    from megafab.checkpoint.snapshot import Background

    go, background = threading.Event(), Background()
    background.start(go.wait)
    heart = Heart(Timers(), Clock(), Alone())  # type: ignore[arg-type]
    (main, _), (other, stack) = heart.beat().stacks.items()
    go.set()
    background.wait()
    assert (main, other) == ("MainThread", "megafab-checkpoint")
    assert [function for _, _, function in stack][-3:] == ["run", "wait", "wait"]


# -- stragglers --------------------------------------------------------------------------------------------


def test_slower_than_the_median():
    assert slower([1.0, 1.4, 1.1, 2.2], 1.5) == {3: 2.0}
    assert slower([1.0, 3.0], 1.5) == {1: 3.0}
    assert slower([0.01, 0.03, 0.01], 1.5, least=0.05) == {}
    assert slower([0.0, 0.2, 0.0], 1.5, least=0.05).keys() == {1}
