"""The techniques that are on, as one: the loop calls the bus, the bus calls their hooks in order.

It costs what its techniques cost: which hooks are overridden is known when the bus is made, so that an
empty one adds no call, no message between ranks and no wait.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megafab.errors import ConfigError
from megafab.loss.ledger import LedgerReport, LossLedger
from megafab.loss.terms import LossTerms
from megafab.run import Action, Batch, GradStats, Progress, StepOutcome, StepPlan, Verdict
from megafab.techniques.base import RESOURCES, Clock, Key, RunPlan, Technique

if TYPE_CHECKING:
    import torch

    from megafab.checkpoint.pieces import LogicalTensor
    from megafab.engine.base import GradientEdit, WeightEditor
    from megafab.topology.mesh import Mesh

_SCALE_BITS = 0x7F800000  # of infinity: above those of every finite float32


class Bus:
    """Calls the hooks of all techniques, and makes one answer of theirs.

    Args:
        techniques: those that are on.
        seed: of the run.
        data_rank: of this replica, for the keys of `on_batch`.
        capabilities: of the engine.
        agree_max: the largest of all ranks' integers; the identity for one rank.
        message: shows one line to the user.

    Attributes:
        terms: the names of the loss terms they add, in order; `notes` those of what they only record.
        plain_loss: whether the loss is the nll alone, every token with the same weight.
        reduced: edits the reduced gradients; None where no technique does.

    Raises:
        ConfigError: a technique needs what the engine lacks, or two change the same thing.
    """

    def __init__(
        self,
        techniques: Sequence[Technique],
        *,
        seed: int,
        data_rank: int,
        capabilities: frozenset[str],
        agree_max: Callable[[int], int],
        message: Callable[[str], None],
    ) -> None:
        self._seed, self._data_rank = seed, data_rank
        self._agree_max, self._message = agree_max, message
        self._debug = os.environ.get("MEGAFAB_DEBUG") == "1"
        self._techniques = _in_order(techniques)
        for technique in self._techniques:
            _check_needs(technique, capabilities)
        _check_writes(self._techniques)
        self.terms = tuple(term for technique in self._techniques for term in technique.terms)
        self.notes = tuple(note for technique in self._techniques for note in technique.notes)
        self.plain_loss = not any(
            technique.writes & {"loss_terms", "token_weights"} for technique in self._techniques
        )
        self._on_start = self._overriding("on_start")
        self._on_schedule = self._overriding("on_schedule")
        self._on_batch = self._overriding("on_batch")
        self._on_loss = self._overriding("on_loss")
        self._on_reduced = self._overriding("on_reduced")
        self._on_gradients = self._overriding("on_gradients")
        self._on_step = self._overriding("on_step")
        self._on_eval = self._overriding("on_eval")
        self.reduced: GradientEdit | None = self._edit if self._on_reduced else None
        if self._techniques:
            message(f"techniques, in order: {', '.join(t.name for t in self._techniques)}")

    def plan(self, plan: RunPlan, mesh: Mesh) -> None:
        """Before any module exists."""
        for technique in self._techniques:
            technique.on_plan(plan, mesh)

    def build(self, stages: Sequence[torch.nn.Module], clock: Clock) -> None:
        """Before the engine wraps this rank's modules."""
        for technique in self._techniques:
            technique.on_build(stages, clock)

    def start(self, progress: Progress, weights: WeightEditor) -> None:
        """Before the first step of this process."""
        for technique in self._on_start:
            technique.on_start(progress, weights)

    def schedule(self, plan: StepPlan, progress: Progress) -> StepPlan:
        """The plan of the next step as techniques want it.

        Raises:
            RuntimeError: with MEGAFAB_DEBUG=1, when ranks have come to different plans.
        """
        for technique in self._on_schedule:
            plan = technique.on_schedule(plan, progress)
        if self._debug:
            self._check_agreement(plan)
        return plan

    def batch(self, batch: Batch, plan: StepPlan) -> Batch:
        """The rows of the step on this data rank."""
        for technique in self._on_batch:
            key = Key((self._seed, technique.name, plan.step, self._data_rank))
            batch = technique.on_batch(batch, plan, key)
        return batch

    def loss(self, terms: LossTerms, batch: Batch) -> None:
        """Terms and weights of one micro-batch: an `engine.base.LossFunction`."""
        for technique in self._on_loss:
            technique.on_loss(terms, batch)

    def _edit(self, gradients: Mapping[str, torch.Tensor]) -> None:
        for technique in self._on_reduced:
            technique.on_reduced(gradients)

    def gradients(self, stats: GradStats, ledger: LossLedger) -> Verdict:
        """What becomes of the gradients: the most severe verdict of any technique on any rank.

        Gradients that are not finite are skipped without asking. Only where a technique has a say do
        ranks exchange a number.
        """
        if not stats.finite:
            return Verdict(Action.SKIP, reason=f"the gradient norm is {stats.norm}")
        if not self._on_gradients:
            return Verdict()
        verdicts = [technique.on_gradients(stats, ledger) for technique in self._on_gradients]
        mine = max(verdicts, key=_severity)
        severity = self._agree_max(_severity(mine))
        reason = mine.reason if severity == _severity(mine) else "another rank's verdict"
        return _verdict(severity, reason)

    def step(self, plan: StepPlan, outcome: StepOutcome, ledger: LossLedger, weights: WeightEditor) -> None:
        """After the update, or after it was discarded."""
        for technique in self._on_step:
            technique.on_step(plan, outcome, ledger, weights)

    def eval(self, entering: bool, weights: WeightEditor, losses: LedgerReport | None = None) -> None:
        """Before (`entering`) and after an evaluation with its losses; left in the opposite order."""
        for technique in self._on_eval if entering else reversed(self._on_eval):
            technique.on_eval(entering, weights, losses)

    def metrics(self, report: LedgerReport) -> dict[str, dict[str, Any]]:
        """The numbers of each technique under its name: its loss terms' means, and what it says itself."""
        numbers = {
            technique.name: {
                **{term: report.term(term) for term in technique.terms},
                **technique.metrics(report),
            }
            for technique in self._techniques
        }
        return {name: values for name, values in numbers.items() if values}

    def state_dict(self) -> dict[str, Any]:
        """The replicated state of each technique by name."""
        return {technique.name: technique.state_dict() for technique in self._techniques}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Gives each technique its state back; one that is new since the checkpoint starts afresh."""
        for technique in self._techniques:
            if technique.name in state:
                technique.load_state_dict(state[technique.name])
            else:
                self._message(f"technique {technique.name} is not in the checkpoint: it starts now")
        for name in state.keys() - {technique.name for technique in self._techniques}:
            self._message(f"technique {name} is off: its state in the checkpoint is left behind")

    def sharded_state(
        self, weights: WeightEditor, only: Container[str] | None = None
    ) -> dict[str, LogicalTensor]:
        """Tensors shaped like parameters, by `technique/name`, as views to save from and load into.

        Args:
            weights: access to the masters.
            only: the techniques to ask; None for all. A load asks those that the checkpoint has.
        """
        return {
            f"{technique.name}/{name}": tensor
            for technique in self._techniques
            if only is None or technique.name in only
            for name, tensor in technique.sharded_state(weights).items()
        }

    def _overriding(self, hook: str) -> tuple[Technique, ...]:
        return tuple(t for t in self._techniques if overrides(type(t), hook))

    def _check_agreement(self, plan: StepPlan) -> None:
        digest = int.from_bytes(hashlib.blake2b(repr(plan).encode(), digest_size=7).digest(), "little")
        if self._agree_max(digest) != digest or self._agree_max(-digest) != -digest:
            raise RuntimeError(f"ranks disagree on the plan of step {plan.step}; here it is {plan}")


def overrides(technique: type[Technique], hook: str) -> bool:
    """Whether a technique has its own version of a hook."""
    return getattr(technique, hook) is not getattr(Technique, hook)


def _in_order(techniques: Sequence[Technique]) -> tuple[Technique, ...]:
    """Each after those it names in `after`, otherwise as given."""
    waiting, ordered = list(techniques), []
    while waiting:
        names = {technique.name for technique in waiting}
        ready = next((t for t in waiting if not names & (set(t.after) - {t.name})), None)
        assert ready is not None, f"each of {sorted(names)} wants to come after another"
        waiting.remove(ready)
        ordered.append(ready)
    return tuple(ordered)


def _check_needs(technique: Technique, capabilities: frozenset[str]) -> None:
    needs = technique.needs | ({"veto"} if overrides(type(technique), "on_gradients") else set())
    missing = sorted(needs - capabilities)
    if missing:
        raise ConfigError(
            f"technique.{technique.name}",
            f"an engine without {', '.join(missing)}",
            f"an engine with {', '.join(missing)}",
            f"take {technique.name} out of technique=[...], or choose another engine",
        )


def _check_writes(techniques: Sequence[Technique]) -> None:
    for number, technique in enumerate(techniques):
        assert technique.writes <= RESOURCES, technique.writes - RESOURCES
        for other in techniques[:number]:
            shared = technique.writes & other.writes
            refused = sorted(shared - (technique.composes & other.composes))
            if refused:
                raise ConfigError(
                    f"technique=[{other.name},{technique.name}]",
                    f"both change {', '.join(refused)}",
                    "one technique for each thing that is changed",
                    "leave one of the two out",
                )


def _severity(verdict: Verdict) -> int:
    """A verdict without its reason as one integer, larger when more severe: SKIP, smaller scales, APPLY."""
    severity = verdict.action.value << 32
    if verdict.action is Action.SCALE:
        assert 0 <= verdict.scale < float("inf"), verdict
        # The bits of non-negative float32 numbers are in the order of the numbers.
        severity += _SCALE_BITS - int.from_bytes(struct.pack(">f", verdict.scale), "big")
    return severity


def _verdict(severity: int, reason: str) -> Verdict:
    action = Action(severity >> 32)
    if action is not Action.SCALE:
        return Verdict(action, reason=reason)
    bits = _SCALE_BITS - (severity & 0xFFFFFFFF)
    return Verdict(action, struct.unpack(">f", bits.to_bytes(4, "big"))[0], reason)
