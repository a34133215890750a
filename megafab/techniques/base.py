"""The one protocol of every paper: hooks that may change plan, schedule, batch, loss, verdict and weights.

Where the hooks stand in `train.py`:

    on_plan(plan, mesh)                                   once, before any module exists
    on_build(stages, clock)                               once, before the engine wraps the modules
    load_state_dict(), sharded_state()                    on resume
    on_start(progress, weights)                           once, before the first step
    each step
        plan    = schedules.at(progress)
        plan    = on_schedule(plan, progress)             every rank
        batch   = loader.take(plan)
        batch   = on_batch(batch, plan, key)              every rank; the same on all ranks of a replica
        ledger  = engine.forward_backward(batch, plan, loss)
                      on_loss(terms, batch)               last pipeline stage, every micro-batch
        stats   = engine.gradient_stats()
                      on_reduced(gradients)               every rank, after the reduction, before the norm
        verdict = on_gradients(stats, ledger)             every rank; the most severe of the job counts
        outcome = engine.update(plan, verdict)
        on_step(plan, outcome, ledger, weights)           every rank
        metrics()                                         on logged steps
    on_eval(entering, weights)                            before and after an evaluation
    state_dict(), sharded_state()                         at a save

Rules that make off equal to the baseline, and on equal across resume and topology:

- `on_schedule` is a pure function of the progress and the technique's saved state.
- Random draws come from the `Key` a hook is given, or from one it makes of (seed, name, step, ...): never
  from a global generator. The state of a `Key` is the integers in it.
- State is replicated (the same on every rank: `state_dict`) or shaped like parameters (`sharded_state`);
  never per rank, which cannot be resharded. Counts are global.
- No collective but through what a hook is given (`terms.population()`, `ledger.reduced()`, `weights.sum()`,
  `weights.commit()`), and those on every rank alike.
- A technique reads no other technique. Two that write one resource are refused unless both list it
  in `composes`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from megafab.loss.ledger import LedgerReport, LossLedger
from megafab.loss.terms import LossTerms
from megafab.run import Batch, GradStats, Progress, StepOutcome, StepPlan, Verdict

if TYPE_CHECKING:
    from megafab.checkpoint.pieces import LogicalTensor
    from megafab.data.plan import DataPlan
    from megafab.engine.base import WeightEditor
    from megafab.model.plan import ModelPlan
    from megafab.model.shape import ModelShape
    from megafab.topology.mesh import Mesh

# What a technique can change; `writes` names what it does change.
RESOURCES = frozenset(
    {
        "model",  # on_plan: the module tree, parameters, tags
        "learning_rate",  # on_schedule, one for each thing a StepPlan says
        "weight_decay",
        "batch_size",
        "sequence_length",
        "kept_tokens",
        "mixture",
        "replay",
        "windows",  # which of a domain's windows are drawn
        "batch",  # on_batch: tokens, mask, columns
        "loss_terms",  # on_loss: terms beside the nll; who reads log_z_BL or mean_logit_BL writes them
        "token_weights",  # on_loss: weights of the nll
        "gradients",  # on_gradients: scale or skip
        "gradient_entries",  # on_reduced: single elements
        "weights",  # on_start, on_step: masters and moments
        "evaluation_weights",  # on_eval: the weights that are evaluated
    }
)


@dataclass(frozen=True, slots=True)
class Key:
    """A counter-based random key: the same parts give the same numbers on any rank, in any order of calls.

    Generators are Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), keyed by a
    hash of the parts, so that neighbouring keys are independent.
    """

    parts: tuple[int | str, ...]

    def fold(self, *parts: int | str) -> Key:
        """A key of its own for a finer thing: a layer, a micro-batch, a row."""
        return Key(self.parts + parts)

    def numpy(self) -> np.random.Generator:
        """A fresh generator at the start of this key's stream."""
        return np.random.Generator(np.random.Philox(key=int.from_bytes(self._digest(), "little")))

    def torch(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh torch generator on `device`; its stream differs between device types."""
        seed = int.from_bytes(self._digest()[:8], "little", signed=True)
        return torch.Generator(device).manual_seed(seed)

    def _digest(self) -> bytes:
        return hashlib.blake2b(repr(self.parts).encode(), digest_size=16).digest()


@dataclass(slots=True)
class Clock:
    """Where the engine is, for layers that must draw: read it once at entry to forward, never write it.

    Activation recompute runs a layer's forward a second time, when the clock has moved on: read it outside
    the recomputed function and pass the value in. `plan` is the step's, None before the first; `micro_batch`
    counts those of the step on this data rank, and `samples` are the global indices of its rows.
    """

    plan: StepPlan | None = None
    micro_batch: int = 0
    samples: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """What a technique may know of its run before it begins. Tuples are by domain, in the corpus' order.

    `seed` is the run's, `weights` the mixture it begins with, `tokens` and `text_bytes` those of the training
    split, `steps` the length of the run. `fixed` are the domains whose share no mixing policy decides.
    `whole_matrices`: the optimizer updates matrices as wholes, so that an element with neither weight, moment
    nor gradient is moved nevertheless. `plans()` goes through the plans of the whole run, from its first step
    on, as schedules and techniques make them from their settings and state; not before `on_start`.
    """

    seed: int
    shape: ModelShape
    domains: tuple[str, ...]
    weights: tuple[float, ...]
    tokens: tuple[int, ...]
    text_bytes: tuple[int, ...]
    steps: int
    fixed: tuple[str, ...] = ()
    whole_matrices: bool = False
    plans: Callable[[], Iterable[StepPlan]] = tuple


@dataclass(slots=True)
class RunPlan:
    """What is going to be built, still arithmetic: edit it in `on_plan`."""

    model: ModelPlan
    data: DataPlan


class Technique:
    """One paper. Override the hooks it needs; a hook that is not overridden costs nothing.

    Class attributes: `name` is its field in `techniques.config.TechniquesConfig`; `needs` the engine
    capabilities without which it cannot work; `writes` the `RESOURCES` it changes, `composes` those of them
    that others may change too; `after` the techniques whose hooks run first when they are on; `terms` the
    names `on_loss` adds to the loss, `notes` those it only has added up (`LossTerms.note`).

    Args:
        config: its dataclass from `techniques.config`, in the attribute `config`.
        facts: of the run, in the attribute `facts`.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    writes: ClassVar[frozenset[str]] = frozenset()
    composes: ClassVar[frozenset[str]] = frozenset()
    after: ClassVar[tuple[str, ...]] = ()
    terms: ClassVar[tuple[str, ...]] = ()
    notes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, facts: Facts) -> None:
        self.config = config
        self.facts = facts

    def on_plan(self, plan: RunPlan, mesh: Mesh) -> None:
        """Edits the plan of the model: config fields, module specs, parameters, tags. Every rank, once.

        Before any module exists, because engines flatten parameters into buffers: what is added or retagged
        later is lost. `mesh` is arithmetic, so `megafab plan` runs this without ranks.
        """

    def on_build(self, stages: Sequence[torch.nn.Module], clock: Clock) -> None:
        """Initialises, freezes or taps this rank's modules; keeps the clock. Once, before wrapping."""

    def on_start(self, progress: Progress, weights: WeightEditor) -> None:
        """Edits the weights that training begins with, new or restored, and their moments, and commits.

        Every rank, once, before the first step; `progress` is what is behind.
        """

    def on_schedule(self, plan: StepPlan, progress: Progress) -> StepPlan:
        """The plan of the next step. Pure in progress and saved state, so that all ranks agree."""
        return plan

    def on_batch(self, batch: Batch, plan: StepPlan, key: Key) -> Batch:
        """The step's rows of this data rank, on the host. `key` is that of (seed, name, step, data rank).

        Runs on every rank of a replica, which must agree: use no randomness but the key. The loss mask
        is final afterwards: valid tokens are counted next.
        """
        return batch

    def on_loss(self, terms: LossTerms, batch: Batch) -> None:
        """Adds named terms or token weights. `batch` has the micro-batch's rows, cut as `terms` are."""

    def on_reduced(self, gradients: Mapping[str, Tensor]) -> None:
        """Edits the gradients in place, element by element, before their norm is taken (`GradientEdit`)."""

    def on_gradients(self, stats: GradStats, ledger: LossLedger) -> Verdict:
        """What to do with the gradients: apply, scale or skip. Needs the capability `veto`."""
        return Verdict()

    def on_step(
        self, plan: StepPlan, outcome: StepOutcome, ledger: LossLedger, weights: WeightEditor
    ) -> None:
        """After the update or its skip: edits weights, updates averages, feeds policies."""

    def on_eval(self, entering: bool, weights: WeightEditor, losses: LedgerReport | None = None) -> None:
        """Puts other weights in place for an evaluation, and the very same bits back after it.

        `losses` are what was measured, when a regular evaluation is over.
        """

    def metrics(self, losses: LedgerReport) -> Mapping[str, Any]:
        """Its own numbers of the last step, written under its name; mappings of them by domain, too.

        Asked for on logged steps only.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Its replicated state, JSON-able, the same on every rank."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""

    def sharded_state(self, weights: WeightEditor) -> Mapping[str, LogicalTensor]:
        """Its tensors shaped like parameters, as views: saved from and loaded into (`weights.describe`)."""
        return {}
