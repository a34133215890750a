from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from megafab.config.schema import TrainConfig
from megafab.errors import ConfigError
from megafab.optim import schedule_text
from megafab.optim.config import BatchRampConfig, Fall, OptimConfig, ScheduleConfig, ScheduleKind
from megafab.optim.schedules import BatchRamp, Schedules, fall
from megafab.optim.schedules import rates as resumed_rates
from megafab.run import Progress, StepOutcome, Verdict

PEAK, RATIO = 3e-4, 0.1


def schedules(train: TrainConfig, schedule: ScheduleConfig, data_ranks: int = 1) -> Schedules:
    return Schedules(
        train,
        OptimConfig(lr=PEAK, weight_decay=0.05),
        schedule,
        seq_len=16,
        domain_weights=(1.0, 3.0),
        data_ranks=data_ranks,
    )


def run_through(plans: Schedules):
    """Every plan of the run, driven as the loop drives it."""
    progress, result = Progress(), []
    while plans.remaining(progress):
        plan = plans.at(progress)
        result.append(plan)
        progress = progress.advance(plan, StepOutcome(True, Verdict(), 1.0))
    return result, progress


def rates(kind: ScheduleKind, steps: int, **settings) -> list[float]:
    config = ScheduleConfig(kind=kind, min_ratio=RATIO, **settings)
    return [plan.lr for plan in run_through(schedules(TrainConfig(steps=steps), config))[0]]


def by_torch(warmup: int, steps: int, after) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    warm = LinearLR(optimizer, start_factor=1 / warmup, end_factor=1.0, total_iters=warmup - 1)
    both = SequentialLR(optimizer, [warm, after(optimizer, steps - warmup)], milestones=[warmup - 1])
    result = []
    for _ in range(steps):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    return result


def test_cosine_is_torchs() -> None:
    want = by_torch(5, 40, lambda o, n: CosineAnnealingLR(o, T_max=n, eta_min=RATIO * PEAK))
    assert rates(ScheduleKind.cosine, 40, warmup=5) == pytest.approx(want, rel=1e-12)


def test_linear_is_torchs() -> None:
    want = by_torch(5, 40, lambda o, n: LinearLR(o, start_factor=1.0, end_factor=RATIO, total_iters=n))
    assert rates(ScheduleKind.linear, 40, warmup=5) == pytest.approx(want, rel=1e-12)


def test_a_rewarmed_run_goes_on_from_where_another_ended() -> None:
    got = rates(ScheduleKind.cosine, 40, warmup=4, start_ratio=RATIO)
    assert got[:4] == pytest.approx([PEAK * factor for factor in (0.325, 0.55, 0.775, 1.0)])
    assert got[4:] == rates(ScheduleKind.cosine, 40, warmup=4)[4:]


def test_inverse_sqrt_by_hand() -> None:
    got = rates(ScheduleKind.inverse_sqrt, 500, warmup=4)
    assert [got[step - 1] / PEAK for step in (2, 4, 16, 100)] == pytest.approx([0.5, 1, 0.5, 0.2])
    assert got[499] == pytest.approx(RATIO * PEAK), "the ratio is the floor"


INFINITE = {"warmup": 10, "cooldown": 20, "constant_ratio": 0.55}


@pytest.mark.parametrize(("shape", "half_way"), [(Fall.cosine, 2.325e-4), (Fall.inverse_sqrt, 1.856295e-4)])
def test_the_phases_of_infinite(shape: Fall, half_way: float) -> None:
    """Peak 3e-4, constant 1.65e-4, end 3e-5, exponentially; numbers of the paper's settings."""
    anneal = {"decay": 20, "decay_shape": Fall.exponential}
    got = rates(ScheduleKind.infinite, 100, cooldown_shape=shape, **INFINITE, **anneal)
    at = {step: got[step - 1] for step in (5, 10, 20, 30, 31, 80, 90, 100)}
    assert at[5] == pytest.approx(1.5e-4)
    assert at[10] == pytest.approx(3e-4)
    assert at[20] == pytest.approx(half_way, rel=1e-6)
    assert at[30] == at[31] == at[80] == pytest.approx(1.65e-4)
    assert at[90] == pytest.approx(7.035624e-5, rel=1e-6)
    assert at[100] == pytest.approx(3e-5)


def test_an_infinite_run_does_not_know_its_end() -> None:
    open_ended = rates(ScheduleKind.infinite, 60, **INFINITE)
    assert open_ended[30:] == [pytest.approx(0.55 * PEAK)] * 30
    longer = rates(ScheduleKind.infinite, 90, **INFINITE)
    assert longer[:60] == open_ended
    branch = rates(ScheduleKind.infinite, 70, decay=10, decay_shape=Fall.exponential, **INFINITE)
    assert branch[:60] == open_ended, "an anneal changes nothing before it"
    assert branch[69] == pytest.approx(RATIO * PEAK)


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        (Fall.linear, (1, 0.75, 0.5, 0)),
        (Fall.cosine, (1, 0.853553, 0.5, 0)),
        (Fall.sqrt, (1, 0.5, 0.292893, 0)),
        (Fall.inverse_sqrt, (1, 0.333593, 0.152811, 0)),
    ],
)
def test_shapes_of_a_fall(shape: Fall, want: tuple[float, ...]) -> None:
    got = [fall(1.0, 0.0, done, shape) for done in (0, 0.25, 0.5, 1)]
    assert got == pytest.approx(want, abs=1e-6)
    assert fall(3.0, 1.0, 0.25, shape) == pytest.approx(1 + 2 * want[1], abs=2e-6)


def test_wsd_falls_in_the_shape_it_is_given() -> None:
    got = rates(ScheduleKind.wsd, 10, warmup=2, decay=4, decay_shape=Fall.sqrt)
    want = [RATIO + (1 - RATIO) * (1 - (step / 4) ** 0.5) for step in range(1, 5)]
    assert got[6:] == pytest.approx([PEAK * factor for factor in want])


def test_what_is_said_of_a_schedule_is_what_it_does() -> None:
    config = ScheduleConfig(kind=ScheduleKind.infinite, decay=20, decay_shape=Fall.exponential, **INFINITE)
    made = schedules(TrainConfig(steps=100), config)
    assert made.describe() == (
        "infinite: 3e-05 at step 1, 0.0003 at step 10, 0.000165 at step 30, 0.000165 at step 80, "
        "3e-05 at step 100"
    )


def test_phases_and_what_is_shown_of_them() -> None:
    config = ScheduleConfig(kind=ScheduleKind.infinite, decay=20, decay_shape=Fall.exponential, **INFINITE)
    made = schedules(TrainConfig(steps=100), config)
    assert made.phases() == [
        ("warm-up", 1, 10),
        ("cooldown", 11, 30),
        ("constant", 31, 80),
        ("anneal", 81, 100),
    ]
    shown = list(schedule_text.lines(made))
    assert shown[2].split() == ["cooldown", "11", "to", "30", "0.000299", "to", "0.000165"]
    curve = [line.partition("|")[2] for line in shown[5:11]]
    assert all(sum(row[c : c + 1] == "*" for row in curve) == 1 for c in range(60))  # one height a column
    assert curve[-1].startswith("*")  # the first step is at a tenth of the peak
    assert curve[2][30] == "*"  # and the plateau at 0.55 of it: the fourth of six heights


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_short_runs_can_be_shown_too(steps: int) -> None:
    made = schedules(TrainConfig(steps=steps), ScheduleConfig(kind=ScheduleKind.wsd, warmup=1, decay=0.2))
    last = [last for _, _, last in made.phases()]
    assert last[-1] == steps
    assert len(list(schedule_text.lines(made))) > 6


def test_a_resume_shows_old_and_new_rates() -> None:
    now = schedules(TrainConfig(steps=40), ScheduleConfig(warmup=2))
    at = Progress(step=20)
    new = f"learning rate: {', '.join(f'{now.rate_of(n):.3g} at step {n}' for n in (21, 22, 30, 40))}"
    assert (
        resumed_rates(now, schedules(TrainConfig(steps=40), ScheduleConfig(warmup=2)), at, at)
        == f"{new}, as before"
    )
    old = schedules(TrainConfig(steps=80), ScheduleConfig(warmup=2))
    was = ", ".join(f"{old.rate_of(n):.3g}" for n in (21, 22, 30, 40))
    assert resumed_rates(now, old, at, at) == f"{new}; it was to be {was}"
    begun = resumed_rates(now, schedules(TrainConfig(steps=20), ScheduleConfig(warmup=2)), at, Progress())
    assert begun.startswith("learning rate: 3e-05 at the end of what went before; now 0.00015 at step 1, ")
    assert resumed_rates(now, None, at, Progress()).startswith("learning rate: 0.00015 at step 1, ")


def test_constant_stays_at_the_peak() -> None:
    assert rates(ScheduleKind.constant, 5, warmup=2) == [PEAK / 2, PEAK, PEAK, PEAK, PEAK]


def test_wsd_by_hand() -> None:
    # 10 steps: warm-up over 2, decay over 4: to 1 - 0.9 * p at p = 1/4, 2/4, 3/4, 1.
    want = [0.5, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1]
    got = rates(ScheduleKind.wsd, 10, warmup=2, decay=0.4)
    assert got == pytest.approx([PEAK * factor for factor in want])


@pytest.mark.parametrize("kind", [ScheduleKind.cosine, ScheduleKind.linear, ScheduleKind.wsd])
@pytest.mark.parametrize("warmup", [0, 1, 0.01, 7])
def test_first_and_last_step(kind: ScheduleKind, warmup: float) -> None:
    phases = {"decay": 0.2} if kind is ScheduleKind.wsd else {}
    got = rates(kind, 50, warmup=warmup, **phases)
    assert got[0] == pytest.approx(PEAK / max(1, warmup if warmup >= 1 else round(50 * warmup)))
    assert max(got) == PEAK
    assert got[-1] == pytest.approx(RATIO * PEAK, rel=1e-12)


def test_a_share_of_the_run_is_the_same_as_its_steps() -> None:
    share = rates(ScheduleKind.cosine, 40, warmup=0.25)
    assert share == rates(ScheduleKind.cosine, 40, warmup=10)


def test_a_run_shorter_than_its_warmup_only_warms_up() -> None:
    assert rates(ScheduleKind.cosine, 3, warmup=10) == pytest.approx([PEAK / 10, PEAK / 5, 3 * PEAK / 10])


def test_a_longer_run_goes_on_at_the_minimum() -> None:
    plans = schedules(TrainConfig(steps=10), ScheduleConfig(warmup=1))
    assert plans.at(Progress(step=14)).lr == pytest.approx(0.1 * PEAK)


def test_tokens_and_steps_agree_without_a_ramp() -> None:
    config = ScheduleConfig(warmup=4, min_ratio=RATIO)
    by_steps, _ = run_through(schedules(TrainConfig(steps=20, global_batch=2), config))
    by_tokens, _ = run_through(schedules(TrainConfig(tokens=20 * 2 * 16, global_batch=2), config))
    assert [p.lr for p in by_tokens] == pytest.approx([p.lr for p in by_steps], rel=1e-12)
    assert len(by_tokens) == 20


def test_the_ramp_by_hand() -> None:
    # Three levels to gain over 24 samples: 8 samples a level.
    #   samples  0  2  4  6 | 8 12 | 16 22 | 28 ...
    #   batch    2  2  2  2 | 4  4 |  6  6 |  8 ...
    ramp = BatchRamp(BatchRampConfig(start=2, increment=2, samples=24), 8)
    consumed, batches = [0], []
    for _ in range(10):
        batches.append(ramp.at(consumed[-1]))
        consumed.append(consumed[-1] + batches[-1])
    assert batches == [2, 2, 2, 2, 4, 4, 6, 6, 8, 8]
    assert [ramp.samples_after(n) for n in range(11)] == consumed
    assert [ramp.steps_until(n) for n in (0, 1, 2, 3, 28, 29, 36, 37)] == [0, 1, 1, 2, 8, 9, 9, 10]


def test_the_ramp_is_megatrons() -> None:
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    theirs = RampupBatchsizeNumMicroBatchesCalculator(32, 1, 1, False, 1, 4, 4, 150)
    ours = BatchRamp(BatchRampConfig(start=4, increment=4, samples=150), 32)
    for samples in range(200):
        theirs.update(samples, consistency_check=False)
        assert ours.at(samples) == theirs.current_global_batch_size, samples


def test_tokens_under_a_ramp_count_steps_exactly() -> None:
    train = TrainConfig(
        tokens=1000, global_batch=8, batch_ramp=BatchRampConfig(start=2, increment=2, samples=24)
    )
    plans = schedules(train, ScheduleConfig(warmup=3, min_ratio=RATIO))
    done, progress = run_through(plans)
    # 1000 tokens are 62.5 sequences: 28 in the eight steps of the ramp, 35 more in five steps of 8.
    assert len(done) == plans.total_steps == 13
    assert progress.tokens == (28 + 5 * 8) * 16
    # Warm-up is by tokens: 32, 64, 96 of 96.
    assert [p.lr / PEAK for p in done[:3]] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert done[-1].lr == pytest.approx(RATIO * PEAK, rel=1e-12)
    assert [p.micro_batches for p in done[:6]] == [2, 2, 2, 2, 4, 4]


def test_the_plan_says_everything() -> None:
    train = TrainConfig(steps=10, global_batch=24, micro_batch=3)
    plan = schedules(train, ScheduleConfig(), data_ranks=4).at(Progress(step=7, samples=168))
    assert (plan.step, plan.global_batch, plan.micro_batch, plan.micro_batches) == (7, 24, 3, 2)
    assert (plan.weight_decay, plan.seq_len, plan.domain_weights) == (0.05, 16, (0.25, 0.75))


def test_the_plan_does_not_depend_on_how_progress_came_about() -> None:
    plans = schedules(TrainConfig(steps=10), ScheduleConfig())
    other = schedules(TrainConfig(steps=10), ScheduleConfig())
    for step in (9, 0, 4):
        assert plans.at(Progress(step=step)) == other.at(Progress(step=step))


@pytest.mark.parametrize(
    ("train", "schedule", "key"),
    [
        (TrainConfig(steps=5, global_batch=6, micro_batch=2), ScheduleConfig(), "train.global_batch=6"),
        (TrainConfig(steps=5, global_batch=0), ScheduleConfig(), "train.global_batch=0"),
        (TrainConfig(), ScheduleConfig(), "train.steps"),
        (TrainConfig(steps=5, tokens=5), ScheduleConfig(), "train.steps"),
        (
            TrainConfig(steps=5, batch_ramp=BatchRampConfig(start=4, increment=0, samples=9)),
            ScheduleConfig(),
            "train.batch_ramp.start=4",
        ),
        (
            TrainConfig(steps=5, global_batch=16, batch_ramp=BatchRampConfig(4, 8, 9)),
            ScheduleConfig(),
            "train.batch_ramp.start=4",
        ),
        (
            TrainConfig(steps=5, global_batch=16, batch_ramp=BatchRampConfig(2, 2, 9)),
            ScheduleConfig(),
            "train.batch_ramp.start=2",
        ),
        (
            TrainConfig(steps=5),
            ScheduleConfig(kind=ScheduleKind.wsd, warmup=3, decay=3),
            "schedule.warmup=3 schedule.decay=3",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(train, schedule, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        schedules(train, schedule, data_ranks=4)
