"""`engine=megatron`: Megatron-core's data parallel buffers, and the sharded optimizer that suits the update.

Gradients accumulate in fp32 buffers and are reduced bucket by bucket while backward goes on: scattered to
core's distributed optimizer (`distributed.py`) for AdamW and Lion, summed for Muon and SOAP, whose
matrices the ranks share out whole (`layerwise.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megafab.engine.base import LossFunction
from megafab.engine.config import EngineConfig
from megafab.engine.distributed import Distributed
from megafab.engine.layerwise import LayerWise
from megafab.engine.scheduled import ScheduledEngine
from megafab.loss.ledger import LossLedger
from megafab.model.gpt import GPT
from megafab.model.plan import ModelPlan
from megafab.model.tags import tag_all
from megafab.optim.config import WHOLE_MATRICES, OptimConfig
from megafab.run import Batch, StepPlan
from megafab.techniques.base import Clock
from megafab.topology.config import ContextMethod
from megafab.topology.groups import Groups


class MegatronEngine(ScheduledEngine):
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
        tagged = tag_all(chunks, groups)
        whole_matrices = optim.name in WHOLE_MATRICES
        self._chunks = _wrap(chunks, plan, engine, distributed=not whole_matrices)
        optimizer = (
            LayerWise(self._chunks, tagged, plan.shape, groups, engine, optim, plan.transformer.params_dtype)
            if whole_matrices
            else Distributed(self._chunks, tagged, plan.transformer, groups, engine, optim)
        )
        super().__init__(
            plan,
            self._chunks,
            tagged,
            optimizer,
            groups,
            clip=optim.clip,
            context_method=context_method,
            clock=clock,
            ledger=ledger,
        )

    def forward_backward(self, batch: Batch, plan: StepPlan, loss: LossFunction) -> LossLedger:
        """All micro-batches of the step; gradients are reduced when it returns."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        return super().forward_backward(batch, plan, loss)


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
