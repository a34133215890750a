"""Learning rate, weight decay and batch size over the run: pure functions of the progress.

A run is measured in its own unit: steps if `train.steps` is set, tokens if `train.tokens` is. With T the
length of the run, W that of the warm-up, C that of a cooldown, D that of the final decay, s, c, r the ratios
`schedule.start_ratio`, `constant_ratio`, `min_ratio`, and u the position at the *end* of a step (so u = 1
unit-step for the first step and u = T for the last), the learning rate is peak * f(u):

    u <= W    f = s + (1 - s) u / W                                        linear warm-up
    u >  W    f = 1                                                        constant
              f = fall(1, r, (u-W)/(T-W)), cosine                          cosine (Loshchilov, Hutter 2017)
              f = fall(1, r, (u-W)/(T-W)), linear                          linear
              f = max(r, sqrt(W / u))                                      inverse_sqrt (Vaswani et al. 2017)
              f = 1, and fall(1, r, (u-T+D)/D) in the last D               wsd (Hu et al. 2024, MiniCPM)
              f = fall(1, c, (u-W)/C) in the next C, then c,
                  and fall(c, r, (u-T+D)/D) in the last D                  infinite (Ibrahim et al. 2024)

fall(high, low, p) goes from high at p = 0 to low at p = 1 in one of the shapes of `fall`. So with s = 0 step
0 has peak / W (never 0), step W-1 has the peak exactly, and the last step of what falls exactly r * peak.
`warmup`, `cooldown` and `decay` are given in steps or, below 1, as a share of the steps; a warm-up is at
least one step, which is then at the peak, but for `infinite` with `warmup=0`, a branch of another run. In a
run measured in tokens they are the tokens of those steps, so that a batch ramp changes nothing about their
number.

With lengths in steps, only the last D of `wsd` and `infinite` depends on where the run ends: such a run may
be made longer or shorter, and an anneal branched off any of its checkpoints, without harm to what came
before. Re-warming (Gupta et al. 2023, Ibrahim et al. 2024) is a new run or stage with `start_ratio`.

The global batch ramps up as in Megatron-LM: it starts at `start` and grows by `increment` after every
`samples / ((global_batch - start) / increment)` samples.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megafab.errors import ConfigError
from megafab.optim.config import BatchRampConfig, Count, Fall, OptimConfig, ScheduleConfig, ScheduleKind
from megafab.run import Progress, StepPlan

if TYPE_CHECKING:
    from megafab.config.schema import TrainConfig


class BatchRamp:
    """The global batch as a function of the samples consumed, and the samples consumed after n steps.

    Raises:
        ConfigError: the ramp does not lead from `start` to `global_batch` in whole increments.
    """

    def __init__(self, config: BatchRampConfig, global_batch: int) -> None:
        self._final = global_batch
        self._start = config.start or global_batch
        self._increment, self._samples = config.increment, config.samples
        self._levels = 0
        if config.start:
            _check_ramp(config, global_batch)
            self._levels = (global_batch - config.start) // config.increment
        self._after = [0]  # samples after n steps, up to the first step at the final batch
        while self._levels and self.at(self._after[-1]) < global_batch:
            self._after.append(self._after[-1] + self.at(self._after[-1]))

    def at(self, samples: int) -> int:
        """The global batch of the step that starts after `samples` samples."""
        if not self._levels or samples >= self._samples:
            return self._final
        return self._start + samples * self._levels // self._samples * self._increment

    def samples_after(self, steps: int) -> int:
        """Samples consumed by the first `steps` steps."""
        ramped = len(self._after) - 1
        if steps <= ramped:
            return self._after[steps]
        return self._after[-1] + (steps - ramped) * self._final

    def steps_until(self, samples: int) -> int:
        """The fewest steps that consume at least `samples` samples."""
        if samples <= self._after[-1]:
            return bisect.bisect_left(self._after, samples)
        return len(self._after) - 1 - (self._after[-1] - samples) // self._final


def _check_ramp(config: BatchRampConfig, global_batch: int) -> None:
    where = f"train.batch_ramp.start={config.start} increment={config.increment} samples={config.samples}"
    fix = "choose start + n * increment = train.global_batch and the samples over which to get there"
    if config.increment < 1 or config.samples < 1:
        raise ConfigError(where, "no increment or no samples", "both at least 1", fix)
    if config.start > global_batch or (global_batch - config.start) % config.increment:
        expected = f"whole increments from start up to train.global_batch={global_batch}"
        raise ConfigError(where, f"{global_batch - config.start} samples to gain", expected, fix)


@dataclass(frozen=True, slots=True)
class Phases:
    """Lengths in the run's unit: T, W (0 for a branch of `infinite` only), C and D of the module's table."""

    total: float
    warmup: float
    cooldown: float
    decay: float


def learning_rate_factor(config: ScheduleConfig, phases: Phases, at: float) -> float:
    """f(u) of the module's table, u = `at`; beyond the total it counts as the total."""
    if at <= phases.warmup:
        return config.start_ratio + (1 - config.start_ratio) * at / phases.warmup
    low, after, left = config.min_ratio, at - phases.warmup, phases.total - at
    falling = phases.total - phases.warmup
    done = min(1.0, after / falling) if falling > 0 else 1.0
    if config.kind is ScheduleKind.cosine:
        return fall(1.0, low, done, Fall.cosine)
    if config.kind is ScheduleKind.linear:
        return fall(1.0, low, done, Fall.linear)
    if config.kind is ScheduleKind.inverse_sqrt:
        return max(low, math.sqrt(phases.warmup / at))
    if config.kind is ScheduleKind.constant:
        return 1.0
    plateau = 1.0
    if config.kind is ScheduleKind.infinite:
        assert config.constant_ratio is not None
        plateau = config.constant_ratio
        if after < phases.cooldown and left >= phases.decay:
            return fall(1.0, plateau, after / phases.cooldown, config.cooldown_shape or Fall.cosine)
    if left >= phases.decay:
        return plateau
    return fall(plateau, low, min(1.0, 1 - left / phases.decay), config.decay_shape or Fall.linear)


def fall(high: float, low: float, done: float, shape: Fall) -> float:
    """From `high` to `low`, at the share `done` of the way (0 to 1).

    With h = high, l = low, p = done:

        linear          h - (h - l) p
        cosine          l + (h - l) (1 + cos(pi p)) / 2
        sqrt            l + (h - l) (1 - sqrt(p))                              Haegele et al. 2024
        inverse_sqrt    h + (l - h) g(p) / g(1),  g(p) = 1 / sqrt(1 + 10 p) - 1
        exponential     h (l / h)^p,  l > 0
    """
    if shape is Fall.cosine:
        return low + (high - low) * (1 + math.cos(math.pi * done)) / 2
    if shape is Fall.sqrt:
        return low + (high - low) * (1 - math.sqrt(done))
    if shape is Fall.inverse_sqrt:
        return high + (low - high) * (1 / math.sqrt(1 + 10 * done) - 1) / (1 / math.sqrt(11) - 1)
    if shape is Fall.exponential:
        return high * (low / high) ** done
    return high - (high - low) * done


class Schedules:
    """What each step does, before techniques change it.

    Args:
        train: length and batch sizes.
        optim: peak learning rate and weight decay.
        schedule: the shape of the learning rate.
        seq_len: tokens of a sequence.
        domain_weights: the mixture, one weight a domain; scaled here to sum to 1.
        data_ranks: replicas that share the global batch.
        flops_per_token: model FLOPs, forward and backward.

    Attributes:
        total_steps: the length of the run in steps, exact under a batch ramp; there will be more where
            techniques leave tokens out.

    Raises:
        ConfigError: a batch does not divide among replicas and micro-batches, neither or both of `steps`
            and `tokens` are set, or the phases of the learning rate do not fit the run.
    """

    def __init__(
        self,
        train: TrainConfig,
        optim: OptimConfig,
        schedule: ScheduleConfig,
        *,
        seq_len: int,
        domain_weights: Sequence[float],
        data_ranks: int,
        flops_per_token: float = 0.0,
    ) -> None:
        _check_batches(train, data_ranks)
        if (train.steps is None) == (train.tokens is None):
            found = "neither" if train.steps is None else "both"
            raise ConfigError("train.steps, train.tokens", found, "exactly one", "set one, the other null")
        self._train, self._optim, self._schedule = train, optim, schedule
        self._seq_len, self._data_ranks = seq_len, data_ranks
        self._flops_per_token = flops_per_token
        self._domain_weights = tuple(weight / sum(domain_weights) for weight in domain_weights)
        self._ramp = BatchRamp(train.batch_ramp, train.global_batch)
        if train.steps is not None:
            self.total_steps = train.steps
            self._position: Callable[[int], int] = lambda steps: steps
        else:
            assert train.tokens is not None
            self.total_steps = self._ramp.steps_until(-(-train.tokens // seq_len))
            self._position = lambda steps: self._ramp.samples_after(steps) * seq_len
        warmup = warmup_steps(schedule, self.total_steps)
        cooldown = _steps(schedule.cooldown or 0, self.total_steps)
        decay = _steps(schedule.decay or 0, self.total_steps)
        _check_phases(schedule, warmup, cooldown, decay, self.total_steps)
        total, ends = self._position(self.total_steps), self._position(warmup)
        self._phases = Phases(
            total=total,
            warmup=ends,
            cooldown=self._position(min(warmup + cooldown, self.total_steps)) - ends,
            decay=total - self._position(max(0, self.total_steps - decay)),
        )
        self._ends = warmup, warmup + cooldown, self.total_steps - decay
        self._boundaries = sorted({1, *self._ends, self.total_steps})

    def describe(self) -> str:
        """The learning rate at the end of each phase, for the reader."""
        rates = ((n, self.rate_of(n)) for n in self._boundaries if 1 <= n <= self.total_steps)
        return f"{self._schedule.kind.value}: " + ", ".join(f"{lr:.3g} at step {n:,}" for n, lr in rates)

    def phases(self) -> list[tuple[str, int, int]]:
        """Each phase with its first and last step, counted from 1; a phase of no steps is left out."""
        warmup, cooldown, stable = (min(end, self.total_steps) for end in self._ends)
        main = self._schedule.kind.value
        falls = {
            ScheduleKind.wsd: ("", "stable", "decay"),
            ScheduleKind.infinite: ("cooldown", "constant", "anneal"),
        }
        names = falls.get(self._schedule.kind, ("", main, ""))
        ends = (warmup, cooldown, max(stable, cooldown), self.total_steps)
        firsts = (1, *(end + 1 for end in ends[:-1]))
        named = zip(("warm-up", *names), firsts, ends, strict=True)
        return [(name, first, last) for name, first, last in named if last >= first]

    def at(self, progress: Progress) -> StepPlan:
        """The plan of the step that follows `progress`.

        The learning rate is that at the end of a step of whole sequences: where a technique changes their
        length afterwards it is off by less than one step, as `progress` counts the tokens really computed.
        """
        global_batch = self._ramp.at(progress.samples)
        if self._train.steps is not None:
            end = progress.step + 1
        else:
            end = self._counted(progress) + global_batch * self._seq_len
        factor = learning_rate_factor(self._schedule, self._phases, end)
        return StepPlan(
            step=progress.step,
            lr=self._optim.lr * factor,
            weight_decay=self._optim.weight_decay,
            global_batch=global_batch,
            micro_batch=self._train.micro_batch,
            micro_batches=global_batch // (self._train.micro_batch * self._data_ranks),
            seq_len=self._seq_len,
            domain_weights=self._domain_weights,
            flops=self._flops_per_token * global_batch * self._seq_len,
        )

    def rate_of(self, step: int) -> float:
        """The learning rate of a step, counted from 1; that of the last one beyond it.

        Of whole sequences: techniques that leave tokens out let a run measured in tokens take more steps.
        """
        at = self._position(min(max(step, 1), self.total_steps))
        return self._optim.lr * learning_rate_factor(self._schedule, self._phases, at)

    def remaining(self, progress: Progress) -> int:
        """What is left of the run, in its unit: steps or tokens. 0 when it is done."""
        if self._train.steps is not None:
            return max(0, self._train.steps - progress.step)
        assert self._train.tokens is not None
        return max(0, self._train.tokens - self._counted(progress))

    def _counted(self, progress: Progress) -> int:
        """The tokens so far, of those that the run is measured in."""
        return progress.tokens if self._train.count is Count.tokens else progress.layer_tokens


def rates(schedules: Schedules, old: Schedules | None, then: Progress, now: Progress) -> str:
    """The learning rate of the next steps beside what a checkpoint's own schedule has there, in one line.

    Args:
        schedules: of this run.
        old: of the run that wrote the checkpoint; None where nobody knows.
        then: its progress.
        now: that of this run, from which the steps are counted.
    """
    ahead = sorted({step for step in (1, 2, 10, 100) if now.step + step < schedules.total_steps})
    steps = [*(now.step + step for step in ahead), schedules.total_steps]
    new = {step: schedules.rate_of(step) for step in steps}
    shown = ", ".join(f"{lr:.3g} at step {step:,}" for step, lr in new.items())
    if old is None:
        return f"learning rate: {shown}"
    if then.step != now.step:
        return f"learning rate: {old.rate_of(then.step):.3g} at the end of what went before; now {shown}"
    was = {step: old.rate_of(step) for step in steps}
    if all(math.isclose(was[step], lr, rel_tol=1e-12) for step, lr in new.items()):
        return f"learning rate: {shown}, as before"
    return f"learning rate: {shown}; it was to be {', '.join(f'{lr:.3g}' for lr in was.values())}"


def warmup_steps(schedule: ScheduleConfig, total: int) -> int:
    """At least one step; none for `infinite` with a warm-up of 0, which is a branch of another run."""
    least = 0 if schedule.kind is ScheduleKind.infinite and schedule.warmup == 0 else 1
    return max(least, _steps(schedule.warmup, total))


def _steps(length: float, total: int) -> int:
    """A length given in steps or, below 1, as a share of the run."""
    return round(length * total) if length < 1 else round(length)


def _check_phases(schedule: ScheduleConfig, warmup: int, cooldown: int, decay: int, total: int) -> None:
    later = [("cooldown", schedule.cooldown, cooldown), ("decay", schedule.decay, decay)]
    given = [("warmup", schedule.warmup, warmup), *((n, v, k) for n, v, k in later if v and k)]
    if len(given) > 1 and sum(steps for *_, steps in given) > total:
        raise ConfigError(
            " ".join(f"schedule.{name}={value:g}" for name, value, _ in given),
            " and ".join(f"{steps} steps of {_PHASES[name]}" for name, _, steps in given),
            f"no more than the run's {total} steps",
            "shorten one of them, or give it as a share of the run",
        )


_PHASES = {"warmup": "warm-up", "cooldown": "cooldown", "decay": "decay"}


def _check_batches(train: TrainConfig, data_ranks: int) -> None:
    """Every batch size of the run must be whole micro-batches on every replica."""
    unit = train.micro_batch * data_ranks
    for where, size in (
        ("train.global_batch", train.global_batch),
        ("train.batch_ramp.start", train.batch_ramp.start),
        ("train.batch_ramp.increment", train.batch_ramp.increment if train.batch_ramp.start else 0),
    ):
        if size % unit or (size < 1 and where == "train.global_batch"):
            raise ConfigError(
                f"{where}={size}",
                f"no whole number of micro-batches on {data_ranks} replicas",
                f"a multiple of train.micro_batch={train.micro_batch} x {data_ranks} = {unit}",
                f"set {where}={max(1, round(size / unit)) * unit} or change train.micro_batch",
            )
