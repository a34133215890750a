"""`engine=deepspeed`: Megatron's schedules over model chunks that DeepSpeed's ZeRO shards (`zero.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from megafab.engine.config import EngineConfig
from megafab.engine.scheduled import ScheduledEngine
from megafab.engine.zero import Zero
from megafab.loss.ledger import LossLedger
from megafab.model.gpt import GPT
from megafab.model.plan import ModelPlan
from megafab.model.tags import TaggedParameter, tag
from megafab.optim.config import OptimConfig
from megafab.techniques.base import Clock
from megafab.topology.config import ContextMethod
from megafab.topology.groups import Groups


class DeepSpeedEngine(ScheduledEngine):
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
        tagged = [list(tag(chunk, groups)) for chunk in chunks]
        zero = Zero(chunks, tagged, groups, engine, optim)
        no_sync = zero.no_sync()
        # A list where there are several chunks, which core's annotation leaves out.
        plan.transformer.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]  # pyright: ignore
        super().__init__(
            plan,
            chunks,
            [t for parameters in tagged for t in parameters],
            zero,
            groups,
            clip=optim.clip,
            context_method=context_method,
            clock=clock,
            ledger=ledger,
            finalize=zero.reduce,
        )
        self.partitions_parameters = engine.zero_stage == 3

    def copies(self) -> Iterator[tuple[TaggedParameter, torch.Tensor]]:
        """Each parameter with what this rank has of it between two layers."""
        if not self.partitions_parameters:
            return super().copies()
        return ((t, t.parameter.ds_tensor.data) for t in self._tagged)  # pyright: ignore
