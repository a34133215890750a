"""What runs cost beside each other, and what a stage did to each domain: numbers of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megafab.telemetry.logged import LoggedRun


@dataclass(frozen=True, slots=True)
class Reach:
    """Where a validation loss was first reached, counted from the beginning of the training.

    `flops` are the model FLOPs of all runs up to there: of a grown model, those of the small one too.
    """

    step: int
    tokens: int
    flops: float


def reach(run: LoggedRun, loss: float) -> Reach | None:
    """The first evaluation of a run with a loss of at most `loss`; None: there was none."""
    for row in run.rows:
        valid = row.get("valid_loss")
        if valid is not None and valid <= loss:
            flops = row.get("total_flops", row.get("flops", 0.0))
            return Reach(row.get("total_steps", row["step"]), row.get("total_tokens", row["tokens"]), flops)
    return None


@dataclass(frozen=True, slots=True)
class Shift:
    """The validation loss of a domain before a stage, the largest and the last of it in the stage.

    Where the last is above `before` the domain was forgotten, where it is below the model has adapted to it.
    """

    domain: str
    before: float
    worst: float
    after: float

    @property
    def change(self) -> float:
        """After less before."""
        return self.after - self.before


def shifts(parent: LoggedRun, run: LoggedRun) -> list[Shift]:
    """What a stage did to each domain that its parent was evaluated on at its end."""
    found = []
    for domain in parent.leaves("valid_domain_loss"):
        before = parent.known(f"valid_domain_loss/{domain}")
        during = run.known(f"valid_domain_loss/{domain}")
        if before and during:
            found.append(Shift(domain, before[-1], max(during), during[-1]))
    return found


def reference(runs: Sequence[LoggedRun]) -> tuple[LoggedRun, float] | None:
    """The first run that no other was begun with, and its last validation loss."""
    for run in runs:
        losses = run.known("valid_loss")
        if losses and all(other.parent != run.name for other in runs):
            return run, losses[-1]
    return None
