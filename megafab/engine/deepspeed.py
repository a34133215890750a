"""`engine=deepspeed`: Megatron's schedules over model chunks that DeepSpeed's ZeRO shards (`zero.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megafab.engine.config import EngineConfig
from megafab.engine.scheduled import ScheduledEngine
from megafab.engine.sharded import Sharding
from megafab.engine.zero import Zero
from megafab.model.gpt import GPT
from megafab.model.plan import ModelPlan
from megafab.model.tags import TaggedParameter, tag
from megafab.optim.config import OptimConfig
from megafab.topology.groups import Groups


class DeepSpeedEngine(ScheduledEngine):
    """Chunks as they are, with ZeRO around them; see `engine.base.Engine` for the contract."""

    def _shard(
        self,
        plan: ModelPlan,
        chunks: Sequence[GPT],
        groups: Groups,
        engine: EngineConfig,
        optim: OptimConfig,
    ) -> Sharding:
        self.partitions_parameters = engine.zero_stage == 3
        tagged = [list(tag(chunk, groups)) for chunk in chunks]
        zero = Zero(chunks, tagged, groups, engine, optim)
        flat = [t for parameters in tagged for t in parameters]
        return Sharding(chunks, flat, zero, zero.no_sync(), zero.reduce)

    def copies(self) -> Iterator[tuple[TaggedParameter, torch.Tensor]]:
        """Each parameter with what this rank has of it between two layers."""
        if not self.partitions_parameters:
            return super().copies()
        return ((t, t.parameter.ds_tensor.data) for t in self._tagged)  # pyright: ignore
