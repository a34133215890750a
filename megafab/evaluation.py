"""The loss on held-out text while a run goes on: the same sequences each time, and no trace left.

An evaluation is cut into parts, between which the ranks ask whether to leave, so that a job near its time
limit has not to wait for the end of it. What was put an end to is made up for by the next session, before
its first step: nothing changes in between, so the numbers are those of a run that was left alone.
"""

from __future__ import annotations

from dataclasses import replace

from megafab.engine.base import nll_only
from megafab.loss.ledger import LedgerReport
from megafab.run import Progress, Run


def evaluate(run: Run, progress: Progress) -> LedgerReport | None:
    """The loss on the validation split by domain, with the weights that techniques want evaluated.

    Leaves no trace: the weights are back to the last bit, and no random number is drawn. Techniques are told
    the losses of an evaluation that is due by `eval.every` only, not of one because the run ends, which a
    longer run would not have. None: a signal has put an end to it.
    """
    weights = run.engine.weights()
    run.bus.eval(True, weights)
    total = report = None
    for batch in run.validation.batches:
        if total is not None and run.signals.leave_now():
            break
        ledger = run.engine.evaluate(batch, run.validation.micro_batch, nll_only)
        if total is None:
            total = ledger
        else:
            total.merge(ledger)
    else:
        report = total and total.reduced()
    run.bus.eval(False, weights, report if run.cadence.evaluates(progress.step, False) else None)
    return report


def make_up(run: Run, progress: Progress) -> tuple[Progress, bool]:
    """Do the evaluation that a signal put an end to, if one is owed; the progress, and whether to leave."""
    leaving = run.signals.leave_now()
    if progress.owes_evaluation and run.cadence.evaluate and not leaving:
        with run.telemetry.timers("evaluate"):
            valid = evaluate(run, progress)
        leaving = valid is None
        if valid is not None:
            run.telemetry.amend(progress.step, valid={"loss": valid.loss, "domain_loss": valid.domain_loss})
            progress = replace(progress, owes_evaluation=False)
    return progress, leaving
