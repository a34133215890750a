"""The page: what one training step is, in the order the papers would say it. Everything else is a part.

    plan -> batch -> losses and gradients -> measure -> verdict -> update -> record, evaluate, save

A step takes its whole global batch before the first forward pass, so that the number of valid tokens, by
which every loss is divided, is known to all ranks. Between any two of the calls stand the hooks of
techniques (`techniques/base.py`). The loop holds no state but the progress: with what `Checkpoints.save`
keeps after step k, step k + 1 of a new process is bit for bit what it would have been.

The host waits for the device where it must: for the gradient norm, which decides whether the update is
applied, and for the losses on steps that are logged, or on all where spikes are looked for. Ranks agree on a
signal about once a second, and within an evaluation too: what is left of it, or all, is then made up for when
the run goes on.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

from megafab.errors import UserError
from megafab.evaluation import evaluate, make_up
from megafab.loss.ledger import LedgerReport, LossLedger
from megafab.run import Progress, Run, StepOutcome, StepPlan


def fit(run: Run) -> Progress:
    """Trains until the run is complete or a signal asks to leave; returns how far it came.

    Once begun, the run is closed at the end whatever happens. Whether a signal ended the run, and the
    exit code that goes with it, is for `run.signals` to say.

    Raises:
        UserError: `train.max_skipped` steps in a row had no finite gradients, or a loss spike (where they are
            looked for) cannot be got past.
    """
    progress = run.checkpoints.restore()
    run.telemetry.start(progress)
    part, weights = run.telemetry.timers, run.engine.weights()
    with closing(run), run.checkpoints:
        run.bus.start(progress, weights)
        run.checkpoints.save_first(progress)
        progress, leaving = make_up(run, progress)
        if leaving:
            run.telemetry.message(f"{run.signals.name}: left before a step; run the same command to go on")
        elif not run.schedules.remaining(progress):
            run.telemetry.message(
                f"nothing left to do: step {progress.step} reaches train.steps or train.tokens; "
                "raise it to go on"
            )

        while run.schedules.remaining(progress) and not leaving:
            run.telemetry.begin(progress.step + 1)
            plan = run.bus.schedule(run.schedules.at(progress), progress)
            plan = run.loader.limit(plan)

            with part("data"):
                batch = run.bus.batch(run.loader.take(plan), plan)
            with part("forward_backward"):
                ledger = run.engine.forward_backward(batch, plan, run.bus.loss)
            with part("gradients"):
                stats = run.engine.gradient_stats(run.bus.reduced)
                verdict = run.bus.gradients(stats, ledger)
            with part("update"):
                outcome = run.engine.update(plan, verdict, stats)
                run.bus.step(plan, outcome, ledger, weights)
            progress = progress.advance(plan, outcome)
            spike = run.spikes.look(progress, outcome, ledger)
            if spike is not None:
                progress, leaving = make_up(run, run.roll_back(spike))
                continue
            run.stragglers.compare(progress.step)

            last, leaving, valid = not run.schedules.remaining(progress), run.signals.leave(), None
            if run.cadence.evaluates(progress.step, last):
                with part("evaluate"):
                    valid = None if leaving else evaluate(run, progress)
                progress = replace(progress, owes_evaluation=valid is None)
            leaving = progress.owes_evaluation or (leaving and not last)  # a run that is complete ends anyway
            _record(run, plan, progress, outcome, ledger, valid, last)
            saving = run.cadence.saves(progress.step, last) or leaving
            run.invariants.check(progress.step, saving=saving)
            if saving:
                with part("checkpoint"):
                    run.checkpoints.save(progress, wait=last or leaving)
            if leaving:
                run.telemetry.message(
                    f"{run.signals.name}: saved after step {progress.step}; run the same command to go on"
                )
            _require_progress(run, progress, outcome)
    return progress


def _record(
    run: Run,
    plan: StepPlan,
    progress: Progress,
    outcome: StepOutcome,
    ledger: LossLedger,
    valid: LedgerReport | None,
    last: bool,
) -> None:
    """One row for the sinks where one is due; without one, nothing is reduced or waited for."""
    if not outcome.applied:
        run.telemetry.message(f"step {progress.step}: update discarded, {outcome.verdict.reason}")
    evaluates = valid is not None or progress.owes_evaluation
    if not run.telemetry.due(progress.step, last) and not evaluates:
        return
    losses = ledger.reduced()
    run.telemetry.record(
        plan=plan,
        progress=progress,
        last=last,
        outcome=outcome,
        loss=losses.loss,
        domain_loss=losses.domain_loss,
        domain_weight=dict(zip(losses.tokens, plan.domain_weights, strict=True)),
        extra={**run.bus.metrics(losses), **run.spikes.metrics(), **run.stragglers.numbers()},
        valid=None if valid is None else {"loss": valid.loss, "domain_loss": valid.domain_loss},
    )


def _require_progress(run: Run, progress: Progress, outcome: StepOutcome) -> None:
    """Ends a run that only discards updates: it would burn its budget without training."""
    if progress.skipped_in_a_row >= run.cadence.max_skipped:
        raise UserError(
            f"train.max_skipped={run.cadence.max_skipped}",
            f"the last {progress.skipped_in_a_row} updates discarded, up to step {progress.step} "
            f"({outcome.verdict.reason})",
            "finite gradients",
            "lower optim.lr or lengthen schedule.warmup, and resume from an earlier checkpoint",
        )
