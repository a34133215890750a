from __future__ import annotations

import os
import signal

import pytest

from megafab.resilience.signals import HANDLED, Signals


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
    with Signals(alone, seconds=0) as signals:
        assert not signals.leave()
        os.kill(os.getpid(), number)
        assert signals.leave()
    assert signals.name == number.name
    assert signals.exit_code == exit_code


def test_without_a_signal_the_end_is_clean() -> None:
    with Signals(alone, seconds=0) as signals:
        assert not signals.leave()
    assert (signals.name, signals.exit_code) == ("", 0)


def test_a_second_interrupt_aborts() -> None:
    with Signals(alone):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_old_handlers_come_back_after_an_error() -> None:
    def fail() -> None:
        with Signals(alone):
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

    with Signals(agree, seconds=1.0, clock=clock) as signals:
        for step in range(13):
            steps.append(step)
            clock.now += step_seconds
            signals.leave()
    assert asked == asked_after


def _leaves_at(rank: int, world: int, receiver: int, at: int) -> tuple[int, str]:
    """The step after which this rank leaves, when `receiver` alone gets a signal in step `at`."""
    import torch
    import torch.distributed as dist

    def agree(value: int) -> int:
        holder = torch.tensor([value])
        dist.all_reduce(holder, op=dist.ReduceOp.MAX)
        return int(holder)

    clock = Clock()
    with Signals(agree, seconds=1.0, clock=clock) as signals:
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
