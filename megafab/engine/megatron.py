"""`engine=megatron`: Megatron-core's data parallel buffers, and the sharded optimizer that suits the update.

Gradients accumulate in fp32 buffers and are reduced bucket by bucket while backward goes on: scattered to
core's distributed optimizer (`distributed.py`) for AdamW and Lion, summed for Muon and SOAP, whose
matrices the ranks share out whole (`layerwise.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megafab.engine.config import EngineConfig
from megafab.engine.distributed import Distributed
from megafab.engine.layerwise import LayerWise
from megafab.engine.scheduled import ScheduledEngine
from megafab.engine.sharded import Sharding
from megafab.model.gpt import GPT
from megafab.model.plan import ModelPlan
from megafab.model.tags import TaggedParameter, tag_all
from megafab.optim.config import WHOLE_MATRICES, OptimConfig
from megafab.topology.groups import Groups


class MegatronEngine(ScheduledEngine):
    """Chunks in core's DDP; see `engine.base.Engine` for the contract."""

    def _shard(
        self,
        plan: ModelPlan,
        chunks: Sequence[GPT],
        groups: Groups,
        engine: EngineConfig,
        optim: OptimConfig,
    ) -> Sharding:
        tagged = tag_all(chunks, groups)
        whole_matrices = optim.name in WHOLE_MATRICES
        wrapped = _wrap(chunks, plan, engine, distributed=not whole_matrices)
        optimizer = (
            LayerWise(wrapped, tagged, plan.shape, groups, engine, optim, plan.transformer.params_dtype)
            if whole_matrices
            else Distributed(wrapped, tagged, plan.transformer, groups, engine, optim)
        )
        self._gathers_later = wrapped if engine.overlap_param_gather else []
        no_sync = [chunk.no_sync for chunk in wrapped] if engine.overlap_grad_reduce else []
        return Sharding(wrapped, tagged, optimizer, no_sync)

    def copies(self) -> Iterator[tuple[TaggedParameter, torch.Tensor]]:
        """Each parameter with what this rank has of it between two layers. A collective.

        Gathers that the next forward pass would overlap are done now: until then a rank has old weights.
        """
        for chunk in self._gathers_later:
            chunk.start_param_sync(force_sync=True)
        return super().copies()


def _wrap(
    chunks: Sequence[GPT], plan: ModelPlan, engine: EngineConfig, *, distributed: bool
) -> list[DistributedDataParallel]:
    """Give every chunk its gradient and parameter buffers."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=engine.overlap_grad_reduce,
        overlap_param_gather=engine.overlap_param_gather,
        use_distributed_optimizer=distributed,
        bucket_size=engine.bucket_parameters,
    )
    return [
        DistributedDataParallel(
            config=plan.transformer, ddp_config=config, module=chunk, disable_bucketing=number > 0
        )
        for number, chunk in enumerate(chunks)
    ]
