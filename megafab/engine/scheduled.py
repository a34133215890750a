"""An engine made of Megatron's schedule and a sharded optimizer: what both engines are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from megafab.checkpoint.pieces import LogicalTensor
from megafab.engine.base import GradientEdit, LossFunction, WeightEditor
from megafab.engine.config import EngineConfig
from megafab.engine.schedule import Schedule
from megafab.engine.sharded import Memory, Sharding
from megafab.engine.slices import MasterWeights, Slice, global_norm, update_scale
from megafab.loss.ledger import LossLedger
from megafab.model.gpt import GPT
from megafab.model.plan import ModelPlan
from megafab.model.tags import TaggedParameter
from megafab.optim.config import OptimConfig
from megafab.run import Action, Batch, GradStats, StepOutcome, StepPlan, Verdict
from megafab.techniques.base import Clock
from megafab.topology.config import ContextMethod
from megafab.topology.groups import Groups


class ScheduledEngine(ABC):
    """Implements `engine.base.Engine` for the model chunks of this rank, as a subclass shards them.

    Args:
        plan: the plan the chunks were built from.
        chunks: this rank's model chunks.
        groups: this rank's place.
        engine, optim: settings.
        context_method: how sequences are split over context ranks.
        clock: told the step and the micro-batch that run, for layers that draw.
        ledger: makes an empty loss ledger.
        head_chunk: tokens whose logits exist at a time; None: all.
        plain_loss: the loss is the nll alone, every token with the same weight.
    """

    capabilities = frozenset({"veto", "weights"})
    partitions_parameters = False

    def __init__(
        self,
        plan: ModelPlan,
        chunks: Sequence[GPT],
        groups: Groups,
        *,
        engine: EngineConfig,
        optim: OptimConfig,
        context_method: ContextMethod,
        clock: Clock,
        ledger: Callable[[], LossLedger],
        head_chunk: int | None,
        plain_loss: bool,
    ) -> None:
        self._clip, self._clock, self._ledger, self._groups = optim.clip, clock, ledger, groups
        sharding = self._shard(plan, chunks, groups, engine, optim)
        self._modules, self._tagged = sharding.modules, sharding.tagged
        self._optimizer = sharding.optimizer
        self._masters = MasterWeights(self._optimizer.slices, self._optimizer.commit, groups)
        self._updates = 0
        self._seed_dropout = groups.seed_dropout if plan.shape.config.dropout else None
        self._schedule = Schedule(
            sharding.modules,
            plan.transformer,
            groups,
            context_method,
            clock,
            head_chunk=head_chunk,
            plain_loss=plain_loss,
            no_sync=sharding.no_sync,
            finalize=sharding.finalize,
        )

    @abstractmethod
    def _shard(
        self,
        plan: ModelPlan,
        chunks: Sequence[GPT],
        groups: Groups,
        engine: EngineConfig,
        optim: OptimConfig,
    ) -> Sharding:
        """Wrap the chunks as the library wants them, and put its optimizer around them."""

    def forward_backward(self, batch: Batch, plan: StepPlan, loss: LossFunction) -> LossLedger:
        """All micro-batches of the step; gradients are reduced when it returns."""
        self._clock.plan = plan
        rows = plan.micro_batch * plan.rows_per_sample
        if self._seed_dropout:
            self._seed_dropout(plan.step)
        self._optimizer.zero_grad()
        known = self._row_losses(batch, rows) if plan.losses_first else None
        for module in self._modules:
            module.train()
        return self._schedule.run(batch, rows, loss, self._ledger(), forward_only=False, step_losses_M=known)

    def _row_losses(self, batch: Batch, rows: int) -> torch.Tensor | None:
        """The losses of all rows of the step before it, dropout off."""
        for module in self._modules:
            module.eval()
        with torch.no_grad():
            return self._schedule.row_losses(batch, rows, self._ledger())

    def gradient_stats(self, edit: GradientEdit | None = None) -> GradStats:
        """The global norm, which is finite exactly when every gradient of the job is."""
        self._optimizer.prepare()
        if edit is not None:
            edit({s.tagged.name: gradient for s, gradient in self._gradients()})
        norm = global_norm(self._gradients(), self._groups)
        return GradStats(norm, math.isfinite(norm))

    def update(self, plan: StepPlan, verdict: Verdict, stats: GradStats) -> StepOutcome:
        """Scale, clip and step; or leave everything as it was."""
        if verdict.action is Action.SKIP:
            self._optimizer.discard()
            return StepOutcome(False, verdict, stats.norm)
        scale = update_scale(verdict, stats.norm, self._clip)
        self._optimizer.step(plan.lr, plan.weight_decay, scale)
        self._updates += 1
        return StepOutcome(True, verdict, stats.norm)

    def evaluate(self, batch: Batch, micro_batch: int, loss: LossFunction) -> LossLedger:
        """Forward only, dropout off."""
        for module in self._modules:
            module.eval()
        with torch.no_grad():
            return self._schedule.run(batch, micro_batch, loss, self._ledger(), forward_only=True)

    def weights(self) -> WeightEditor:
        """The master weights of this rank."""
        return self._masters

    def memory(self) -> Memory:
        """What parameters, gradients and optimizer take on this rank now."""
        return self._optimizer.memory()

    def copies(self) -> Iterator[tuple[TaggedParameter, torch.Tensor]]:
        """Each parameter with what this rank has of it between two layers."""
        return ((t, t.parameter.data) for t in self._tagged)

    def sharded_state(self) -> Mapping[str, LogicalTensor]:
        """Masters and the optimizer's state by global name."""
        return {**self._masters.sharded_state(), **self._optimizer.factors()}

    def state_dict(self) -> dict[str, int]:
        """The count of updates, from which the optimizer's counters follow."""
        return {"updates": self._updates}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The optimizer's counters from the count of updates, the model's copies from the masters."""
        self._updates = state["updates"]
        self._optimizer.set_updates(self._updates)
        self._optimizer.commit()

    def _gradients(self) -> Iterator[tuple[Slice, torch.Tensor]]:
        return zip(self._optimizer.slices, self._optimizer.gradients(), strict=True)
