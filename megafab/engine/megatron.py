"""`engine=megatron`: Megatron-core's data parallel buffers, and the sharded optimizer that suits the update.

Gradients accumulate in fp32 buffers and are reduced bucket by bucket while backward goes on: scattered to
core's distributed optimizer (`distributed.py`) for AdamW and Lion, summed for Muon and SOAP, whose
matrices the ranks share out whole (`layerwise.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megafab.checkpoint.pieces import LogicalTensor
from megafab.engine.base import LossFunction, WeightEditor
from megafab.engine.config import EngineConfig
from megafab.engine.distributed import Distributed
from megafab.engine.layerwise import LayerWise
from megafab.engine.schedule import Schedule
from megafab.engine.slices import MasterWeights, Slice, global_norm, update_scale
from megafab.loss.ledger import LossLedger
from megafab.model.gpt import GPT
from megafab.model.plan import ModelPlan
from megafab.model.tags import tag_all
from megafab.optim.config import WHOLE_MATRICES, OptimConfig
from megafab.run import Action, Batch, GradStats, StepOutcome, StepPlan, Verdict
from megafab.techniques.base import Clock
from megafab.topology.config import ContextMethod
from megafab.topology.groups import Groups


class ShardedOptimizer(Protocol):
    """Masters and moments of this rank, of model chunks in core's DDP."""

    slices: list[Slice]

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        ...

    def prepare(self) -> None:
        """Bring the reduced gradients to where they are needed. A collective, as are `step` and `commit`."""
        ...

    def gradients(self) -> Sequence[torch.Tensor]:
        """The gradients of `slices`, flat, to be scaled in place; between `prepare` and `step`."""
        ...

    def step(self, lr: float, weight_decay: float) -> None:
        """Update the masters by the gradients, and the model from the masters."""
        ...

    def set_updates(self, updates: int) -> None:
        """Set the counters that follow from the count of updates."""
        ...

    def commit(self) -> None:
        """Update the model from the masters."""
        ...

    def factors(self) -> Mapping[str, LogicalTensor]:
        """State that is not shaped like a parameter, and so is not in `slices`."""
        ...


class MegatronEngine:
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
        tagged = tag_all(chunks, groups)
        whole_matrices = optim.name in WHOLE_MATRICES
        self._chunks = _wrap(chunks, plan, engine, distributed=not whole_matrices)
        self._optimizer: ShardedOptimizer = (
            LayerWise(tagged, plan.shape, groups, engine, optim, plan.transformer.params_dtype)
            if whole_matrices
            else Distributed(self._chunks, tagged, plan.transformer, groups, engine, optim)
        )
        self._masters = MasterWeights(self._optimizer.slices, self._optimizer.commit)
        self._groups, self._updates = groups, 0
        self._seed_dropout = groups.seed_dropout if plan.shape.config.dropout else None
        self._schedule = Schedule(self._chunks, plan.transformer, groups, context_method, clock)

    def forward_backward(self, batch: Batch, plan: StepPlan, loss: LossFunction) -> LossLedger:
        """All micro-batches of the step; gradients are reduced when it returns."""
        self._clock.step = plan.step
        if self._seed_dropout:
            self._seed_dropout(plan.step)
        for chunk in self._chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        return self._schedule.run(batch, plan.micro_batch, loss, self._ledger(), forward_only=False)

    def gradient_stats(self) -> GradStats:
        """The global norm, which is finite exactly when every gradient of the job is."""
        self._optimizer.prepare()
        pairs = zip(self._optimizer.slices, self._optimizer.gradients(), strict=True)
        norm = global_norm(pairs, self._groups)
        return GradStats(norm, math.isfinite(norm))

    def update(self, plan: StepPlan, verdict: Verdict, stats: GradStats) -> StepOutcome:
        """Scale, clip and step; or leave everything as it was."""
        if verdict.action is Action.SKIP:
            return StepOutcome(False, verdict, stats.norm)
        scale = update_scale(verdict, stats.norm, self._clip)
        if scale != 1.0:
            torch._foreach_mul_(list(self._optimizer.gradients()), scale)  # pyright: ignore
        self._optimizer.step(plan.lr, plan.weight_decay)
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


def _wrap(
    chunks: Sequence[GPT], plan: ModelPlan, engine: EngineConfig, *, distributed: bool
) -> list[DistributedDataParallel]:
    """Give every chunk its gradient and parameter buffers, and the schedule its hooks into them."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=engine.overlap_grad_reduce,
        overlap_param_gather=engine.overlap_param_gather,
        use_distributed_optimizer=distributed,
        bucket_size=engine.bucket_parameters,
    )
    wrapped = [
        DistributedDataParallel(
            config=plan.transformer, ddp_config=config, module=chunk, disable_bucketing=number > 0
        )
        for number, chunk in enumerate(chunks)
    ]
    if engine.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        # A list where there are several chunks, which core's annotation leaves out.
        plan.transformer.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]  # pyright: ignore
    return wrapped
