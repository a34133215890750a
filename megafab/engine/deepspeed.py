"""`engine=deepspeed`: Megatron's schedules over model chunks that DeepSpeed's ZeRO shards (`zero.py`)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from megafab.checkpoint.pieces import LogicalTensor
from megafab.engine import zero
from megafab.engine.base import LossFunction, WeightEditor
from megafab.engine.config import EngineConfig
from megafab.engine.schedule import Schedule
from megafab.engine.slices import MasterWeights, Slice, global_norm, update_scale
from megafab.loss.ledger import LossLedger
from megafab.model.gpt import GPT
from megafab.model.plan import ModelPlan
from megafab.model.tags import tag
from megafab.optim.config import OptimConfig
from megafab.run import Action, Batch, GradStats, StepOutcome, StepPlan, Verdict
from megafab.techniques.base import Clock
from megafab.topology.config import ContextMethod
from megafab.topology.groups import Groups


class DeepSpeedEngine:
    """Steps the model chunks of this rank; see `engine.base.Engine` for the contract.

    Args:
        plan: the plan the chunks were built from.
        chunks: this rank's model chunks.
        groups: this rank's place.
        engine, optim: settings.
        context_method: how sequences are split over context ranks.
        clock: told the step and the micro-batch that run, for layers that draw.
        ledger: makes an empty loss ledger.
    """

    capabilities = frozenset({"veto", "weights"})

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
    ) -> None:
        self._clip, self._clock, self._ledger = optim.clip, clock, ledger
        self._chunks, self._groups, self._updates = chunks, groups, 0
        self._zeros = [zero.wrap(chunk, list(tag(chunk, groups)), groups, engine, optim) for chunk in chunks]
        slices = (s for z in self._zeros for s in z.slices)
        self._masters = MasterWeights(slices, self._commit)
        self._seed_dropout = groups.seed_dropout if plan.shape.config.dropout else None
        if engine.zero_stage == 1 and engine.overlap_grad_reduce:
            no_sync = [_no_sync(z) for z in self._zeros]
            # A list where there are several chunks, which core's annotation leaves out.
            plan.transformer.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]  # pyright: ignore
        self._schedule = Schedule(
            chunks, plan.transformer, groups, context_method, clock, finalize=self._reduce
        )

    def forward_backward(self, batch: Batch, plan: StepPlan, loss: LossFunction) -> LossLedger:
        """All micro-batches of the step; gradients are reduced when it returns."""
        self._clock.step = plan.step
        if self._seed_dropout:
            self._seed_dropout(plan.step)
        for chunk in self._chunks:
            chunk.train()
        return self._schedule.run(batch, plan.micro_batch, loss, self._ledger(), forward_only=False)

    def gradient_stats(self) -> GradStats:
        """The global norm, which is finite exactly when every gradient of the job is."""
        norm = global_norm(self._gradients(), self._groups)
        return GradStats(norm, math.isfinite(norm))

    def update(self, plan: StepPlan, verdict: Verdict, stats: GradStats) -> StepOutcome:
        """Scale, clip and step; or leave everything as it was."""
        if verdict.action is Action.SKIP:
            for z in self._zeros:
                z.discard()
            return StepOutcome(False, verdict, stats.norm)
        scale = update_scale(verdict, stats.norm, self._clip)
        if scale != 1.0:
            torch._foreach_mul_([gradient for _, gradient in self._gradients()], scale)  # pyright: ignore
        for z in self._zeros:
            z.step(plan.lr, plan.weight_decay)
        self._updates += 1
        return StepOutcome(True, verdict, stats.norm)

    def evaluate(self, batch: Batch, micro_batch: int, loss: LossFunction) -> LossLedger:
        """Forward only, dropout off."""
        for chunk in self._chunks:
            chunk.eval()
        with torch.no_grad():
            return self._schedule.run(batch, micro_batch, loss, self._ledger(), forward_only=True)

    def weights(self) -> WeightEditor:
        """The master weights of this rank."""
        return self._masters

    def sharded_state(self) -> Mapping[str, LogicalTensor]:
        """Masters and moments by global name."""
        return self._masters.sharded_state()

    def state_dict(self) -> dict[str, int]:
        """The count of updates, from which the optimizer's counters follow."""
        return {"updates": self._updates}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The optimizer's counters from the count of updates, the model's copies from the masters."""
        self._updates = state["updates"]
        for z in self._zeros:
            z.set_updates(self._updates)
        self._commit()

    def _gradients(self) -> list[tuple[Slice, torch.Tensor]]:
        return [pair for z in self._zeros for pair in zip(z.slices, z.gradients(), strict=True)]

    def _reduce(self) -> None:
        for z in self._zeros:
            z.reduce()
        zero.sum_over_other_axes(self._gradients(), self._groups)

    def _commit(self) -> None:
        for z in self._zeros:
            z.commit()


def _no_sync(z: zero.Zero) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What core's schedules enter for all backward passes but the last."""

    @contextlib.contextmanager
    def no_sync() -> Iterator[None]:
        z.last_backward(False)
        try:
            yield
        finally:
            z.last_backward(True)

    return no_sync
