from __future__ import annotations

import os
import signal

import pytest

from megafab.resilience.signals import HANDLED, Received, Signals, TimeLimit


def alone(value: int) -> int:
    return value


class Clock:
    """Seconds that pass only when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)]
)
def test_a_signal_asks_to_leave(number: signal.Signals, exit_code: int) -> None:
    with Received() as received:
        signals = Signals(alone, received, seconds=0)
        assert not signals.leave()
        os.kill(os.getpid(), number)
        assert signals.leave()
    assert signals.name == number.name
    assert signals.exit_code == exit_code


def test_without_a_signal_the_end_is_clean() -> None:
    with Received() as received:
        signals = Signals(alone, received, seconds=0)
        assert not signals.leave()
    assert (signals.name, signals.exit_code) == ("", 0)


def test_a_second_interrupt_aborts() -> None:
    with Received():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_old_handlers_come_back_after_an_error() -> None:
    def fail() -> None:
        with Received():
            assert all(signal.getsignal(number) not in before for number in HANDLED)
            raise RuntimeError

    before = [signal.getsignal(number) for number in HANDLED]
    with pytest.raises(RuntimeError):
        fail()
    assert [signal.getsignal(number) for number in HANDLED] == before


@pytest.mark.parametrize(
    ("step_seconds", "asked_after"), [(0.25, [1, 5, 9, 13]), (3.0, list(range(1, 14))), (0.001, [1])]
)
def test_ranks_agree_about_once_a_second_whatever_a_step_takes(
    step_seconds: float, asked_after: list[int]
) -> None:
    clock, asked, steps = Clock(), [], []

    def agree(value: int) -> int:
        asked.append(len(steps))
        return value

    with Received() as received:
        signals = Signals(agree, received, seconds=1.0, clock=clock)
        for step in range(13):
            steps.append(step)
            clock.now += step_seconds
            signals.leave()
    assert asked == asked_after


def test_asked_between_steps_the_ranks_agree_at_once_and_steps_are_counted_afresh() -> None:
    clock, asked = Clock(), []

    def agree(value: int) -> int:
        asked.append(clock.now)
        return value

    with Received() as received:
        signals = Signals(agree, received, seconds=1.0, clock=clock)
        clock.now = 100.0  # building a run is no step
        assert not signals.leave_now()
        for _ in range(9):
            clock.now += 0.25
            signals.leave()
        assert asked == [100.0, 100.25, 101.25, 102.25]
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.leave_now()


def test_a_time_limit_leaves_room_for_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.time", lambda: now)
    limit = TimeLimit(2000.0, lead=300.0)
    signals = Signals(alone, Received(), limit=limit, seconds=0)
    now = 1699.0
    assert not signals.leave_now()
    now = 1701.0  # no save was measured yet: 300 seconds before the end
    assert signals.leave_now()
    signals.saved(10.0)  # 30 for what is not measured, 15 for a save
    assert not signals.leave_now()
    now = 1956.0
    assert signals.leave_now()
    assert (signals.name, signals.exit_code) == ("the time limit is near", 0)


@pytest.mark.parametrize(("step_seconds", "near"), [(2.0, False), (3.0, True)])
def test_a_time_limit_leaves_room_for_a_step(
    monkeypatch: pytest.MonkeyPatch, step_seconds: float, near: bool
) -> None:
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert TimeLimit(105.0, lead=100.0).is_near(step_seconds) is near


def _leaves_at(rank: int, world: int, receiver: int, at: int) -> tuple[int, str]:
    """The step after which this rank leaves, when `receiver` alone gets a signal in step `at`."""
    import torch
    import torch.distributed as dist

    def agree(value: int) -> int:
        holder = torch.tensor([value])
        dist.all_reduce(holder, op=dist.ReduceOp.MAX)
        return int(holder)

    clock = Clock()
    with Received() as received:
        signals = Signals(agree, received, seconds=1.0, clock=clock)
        for step in range(1, 100):
            if rank == receiver and step == at:
                os.kill(os.getpid(), signal.SIGTERM)
            clock.now += 0.25 if rank else 0.2  # ranks measure different times
            if signals.leave():
                return step, signals.name
    return 0, ""


@pytest.mark.multiproc
@pytest.mark.parametrize("receiver", [0, 1])
def test_all_ranks_leave_after_the_same_step(ranks, receiver: int) -> None:
    # Agreements after steps 1, 5, 9, 13: every fourth, as the slowest rank wants.
    assert ranks.run(_leaves_at, receiver, 7, world=2) == [(9, "SIGTERM")] * 2
