"""The nouns of the training loop: small immutable values that pass between its parts.

Shape suffixes: B sequences of one data rank in one step, L sequence length, D domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from types import TracebackType

    import torch

    from megafab.data.loader import Loader
    from megafab.engine.base import Engine
    from megafab.optim.schedules import Schedules
    from megafab.resilience.invariants import Invariants
    from megafab.resilience.signals import Signals
    from megafab.resilience.spikes import Spike, Spikes
    from megafab.resilience.stragglers import Stragglers
    from megafab.resilience.watchdog import Watchdog
    from megafab.techniques.bus import Bus
    from megafab.telemetry.metrics import Telemetry


@dataclass(frozen=True, slots=True)
class Totals:
    """What was spent on a training, or on what went before a run in it."""

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    layer_tokens: int = 0
    flops: float = 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. All counts are global, so that they survive a change of topology.

    `tokens` counts positions the model computed (rows x sequence length), padding included, `layer_tokens`
    the same with positions that a layer left out not counted for it, `flops` the model FLOPs of it all;
    `skipped` counts steps whose update was discarded, `skipped_in_a_row` the current streak. `before` is what
    the runs have spent whose checkpoint this one began with. `owes_evaluation`: one was due after this step,
    and the run was left without it.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    layer_tokens: int = 0
    flops: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    before: Totals = field(default_factory=Totals)
    owes_evaluation: bool = False

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Progress:
        """The progress that `dataclasses.asdict` made `state` of."""
        counts = {name: value for name, value in state.items() if name != "before"}
        return Progress(**counts, before=Totals(**state.get("before", {})))

    @property
    def totals(self) -> Totals:
        """What was spent so far, by this run and before it."""
        before = self.before
        return Totals(
            before.steps + self.step,
            before.samples + self.samples,
            before.tokens + self.tokens,
            before.layer_tokens + self.layer_tokens,
            before.flops + self.flops,
        )

    def advance(self, plan: StepPlan, outcome: StepOutcome) -> Progress:
        """The progress after a step; where its update was discarded, its data are consumed all the same."""
        return replace(
            self,
            step=self.step + 1,
            samples=self.samples + plan.global_batch,
            tokens=self.tokens + plan.tokens,
            layer_tokens=self.layer_tokens + plan.layer_tokens,
            flops=self.flops + plan.flops,
            skipped=self.skipped + (not outcome.applied),
            skipped_in_a_row=0 if outcome.applied else self.skipped_in_a_row + 1,
            owes_evaluation=False,
        )


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step will do; a pure function of progress and techniques' state, identical on every rank.

    Sizes: `global_batch` and `micro_batch` count samples, `micro_batches` is per data rank; a sample becomes
    `rows_per_sample` rows of `seq_len` tokens. `kept_tokens` is how many of a row's tokens the layers that
    drop tokens keep, `mean_kept_tokens` the mean of all layers; None: all. `flops` are the model FLOPs of the
    whole step.

    Data: `domain_weights` sums to 1, in the order of the corpus' domains; `replayed` are the domains whose
    joint weight is dealt out exactly instead of drawn; `admitted` has for each domain how many of its easiest
    windows may be drawn, None for all.

    With `losses_first`, the losses of all samples are known before the first backward pass
    (`loss.terms.LossTerms.population`), at the price of one more forward pass.
    """

    step: int
    lr: float
    weight_decay: float
    global_batch: int
    micro_batch: int
    micro_batches: int
    seq_len: int
    domain_weights: tuple[float, ...]
    rows_per_sample: int = 1
    kept_tokens: int | None = None
    mean_kept_tokens: int | None = None
    flops: float = 0.0
    replayed: tuple[int, ...] = ()
    admitted: tuple[int, ...] | None = None
    losses_first: bool = False

    @property
    def tokens(self) -> int:
        """Positions that the model computes."""
        return self.global_batch * self.rows_per_sample * self.seq_len

    @property
    def layer_tokens(self) -> int:
        """Positions that the mean layer computes."""
        kept = self.seq_len if self.mean_kept_tokens is None else self.mean_kept_tokens
        return self.global_batch * self.rows_per_sample * kept


@dataclass(frozen=True, slots=True)
class Retrieved:
    """The neighbours of each chunk of a batch's rows: B rows, C chunks of a row, K neighbours, R tokens.

    A neighbour that is missing has length 0; tokens beyond the length are padding.
    """

    tokens_BCKR: torch.Tensor  # int64
    length_BCK: torch.Tensor  # int64

    def rows(self, start: int, stop: int) -> Retrieved:
        """Those of rows `start:stop`."""
        return Retrieved(self.tokens_BCKR[start:stop], self.length_BCK[start:stop])


@dataclass(frozen=True, slots=True)
class Batch:
    """All sequences of one step on one data rank, on the host; rows are in sample order.

    `labels_BL[b, l]` is the token after `tokens_BL[b, l]`; `loss_mask_BL` is 0 where no prediction is
    asked for (a label in the next document). `document_BL` numbers the documents inside a row from 0,
    and `position_BL` restarts with each of them when packing is `document`. `sample_B` is the global
    sample index, `domain_B` the domain's index. `columns` are further values of the positions, each [B, L],
    and `retrieved` what a database has for the chunks of each row.
    """

    tokens_BL: torch.Tensor  # int64
    labels_BL: torch.Tensor  # int64
    loss_mask_BL: torch.Tensor  # float32
    position_BL: torch.Tensor  # int64
    document_BL: torch.Tensor  # int32
    domain_B: torch.Tensor  # int64
    sample_B: torch.Tensor  # int64
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict[str, "torch.Tensor"])
    retrieved: Retrieved | None = None

    def rows(self, start: int, stop: int) -> Batch:
        """The same batch with rows `start:stop` only."""
        return Batch(
            self.tokens_BL[start:stop],
            self.labels_BL[start:stop],
            self.loss_mask_BL[start:stop],
            self.position_BL[start:stop],
            self.document_BL[start:stop],
            self.domain_B[start:stop],
            self.sample_B[start:stop],
            {name: value[start:stop] for name, value in self.columns.items()},
            self.retrieved and self.retrieved.rows(start, stop),
        )

    @staticmethod
    def concatenate(batches: Sequence[Batch]) -> Batch:
        """The rows of several batches, in order."""
        import torch  # here, so that reading a run's records does not need it

        joined: dict[str, Any] = {}
        for name in Batch.__slots__:
            values = [getattr(batch, name) for batch in batches]
            if isinstance(values[0], torch.Tensor):
                joined[name] = torch.cat(values)
            elif name == "retrieved":
                pairs = [(value.tokens_BCKR, value.length_BCK) for value in values if value is not None]
                joined[name] = Retrieved(*map(torch.cat, zip(*pairs, strict=True))) if pairs else None
            else:
                joined[name] = {key: torch.cat([value[key] for value in values]) for key in values[0]}
        return Batch(**joined)

    def without_labels(self) -> Batch:
        """The same rows asked to predict nothing: they count for nothing."""
        return replace(self, loss_mask_BL=self.loss_mask_BL * 0)

    def positions(self, where_L: torch.Tensor) -> Batch:
        """The same rows cut to some positions of the sequence, such as a context rank's."""
        return replace(
            self,
            tokens_BL=self.tokens_BL[:, where_L],
            labels_BL=self.labels_BL[:, where_L],
            loss_mask_BL=self.loss_mask_BL[:, where_L],
            position_BL=self.position_BL[:, where_L],
            document_BL=self.document_BL[:, where_L],
            columns={name: value[:, where_L] for name, value in self.columns.items()},
        )


@dataclass(frozen=True, slots=True)
class GradStats:
    """Gradients after reduction, before any update: their global L2 norm, and whether all are finite."""

    norm: float
    finite: bool


class Action(Enum):
    """What to do with a step's gradients, mildest first."""

    APPLY = 0
    SCALE = 1
    SKIP = 2


@dataclass(frozen=True, slots=True)
class Verdict:
    """One answer for the whole job. `scale` multiplies the gradients when the action is SCALE."""

    action: Action = Action.APPLY
    scale: float = 1.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What became of the gradients. `norm` is the global norm before clipping."""

    applied: bool
    verdict: Verdict
    norm: float


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One logged step, as every sink receives it. Values are plain numbers, strings and nested mappings.

    `row` always has: step, samples, tokens, loss, grad_norm, lr, tokens_per_second, step_seconds, mfu
    (null where the device's peak is unknown), skipped, seconds (of each part of the step),
    domain_loss, domain_weight, and of the whole training, with what the runs before have spent, total_steps,
    total_tokens and total_flops; valid_loss and valid_domain_loss on steps that evaluated;
    a technique's own numbers under its name.
    """

    row: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Cadence:
    """When the loop does what it does not do every step. Steps are counted from 1.

    `eval_every` and `save_every` are steps between two, 0 for none but at the end; `evaluate` False turns
    evaluation off, the end included; `save_last` saves at the end; `max_skipped` steps in a row whose update
    was discarded end the run.
    """

    eval_every: int
    evaluate: bool
    save_every: int
    save_last: bool
    max_skipped: int

    def evaluates(self, step: int, last: bool) -> bool:
        """Whether to evaluate after this step."""
        return self.evaluate and (last or _divides(self.eval_every, step))

    def saves(self, step: int, last: bool) -> bool:
        """Whether to save after this step."""
        return (last and self.save_last) or _divides(self.save_every, step)


def _divides(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


@dataclass(frozen=True, slots=True)
class Validation:
    """This data rank's part of the fixed validation sequences, evaluated `micro_batch` rows at a time."""

    batches: Sequence[Batch]
    micro_batch: int


class Checkpoints(Protocol):
    """Saves all state of a run and brings it back: engine, loader, techniques and progress.

    As a context it holds the saves that are written while training goes on: it is left when the last of
    them is on the disk.
    """

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the save under way; raises what went wrong with it, if nothing else did."""
        ...

    def restore(self) -> Progress:
        """Fills the run's parts from the checkpoint to start from; `Progress()` where there is none."""
        ...

    def save(self, progress: Progress, *, wait: bool = False) -> object:
        """Everything that the step after `progress` depends on; with `wait`, committed when this returns."""
        ...

    def save_first(self, progress: Progress) -> None:
        """Saves a run that may want to go back and has no checkpoint yet."""
        ...

    def roll_back(self, step: int, margin: int) -> Progress:
        """Fills the run's parts as they were `margin` steps before `step`, or earlier."""
        ...

    def discard_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps."""
        ...


@dataclass(frozen=True, slots=True)
class Run:
    """The parts of a training run, as `build` puts them together and `train.fit` uses them."""

    engine: Engine
    loader: Loader
    schedules: Schedules
    bus: Bus
    telemetry: Telemetry
    checkpoints: Checkpoints
    validation: Validation
    invariants: Invariants
    signals: Signals
    spikes: Spikes
    watchdog: Watchdog
    stragglers: Stragglers
    cadence: Cadence

    def roll_back(self, spike: Spike) -> Progress:
        """Bring every part back to before a spike; all that stays is what is known of the spike now.

        That is committed at once, as the checkpoint a crash resumes from, and then the later ones go.

        Raises:
            UserError: there is no checkpoint to go back to, or all are damaged.
        """
        with self.telemetry.timers("checkpoint"):
            progress = self.checkpoints.roll_back(spike.first - 1, self.spikes.margin)
            self.spikes.decide(spike, progress)
            self.checkpoints.save(progress, wait=True)
            self.checkpoints.discard_after(progress.step)
        self.telemetry.rewind(progress)
        self.bus.start(progress, self.engine.weights())
        return progress

    def close(self) -> None:
        """Ends what runs beside the loop: the read ahead and the sinks."""
        self.loader.close()
        self.telemetry.close()
