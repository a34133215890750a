"""Process groups of the parallel axes: the only importer of `megatron.core.parallel_state`."""

from __future__ import annotations

import datetime
import hashlib
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megafab.platform import platform
from megafab.topology.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Groups:
    """This rank's place and the groups it reduces over.

    `expert_data`: the ranks that hold copies of this rank's experts. `embedding`: the first and the last
    stage, which share tied embeddings; None on stages between. `host`: a gloo group of all ranks.
    """

    mesh: Mesh
    rank: int
    seed: int
    tensor: dist.ProcessGroup
    context: dist.ProcessGroup
    data: dist.ProcessGroup
    data_context: dist.ProcessGroup
    expert: dist.ProcessGroup
    expert_data: dist.ProcessGroup
    embedding: dist.ProcessGroup | None
    host: dist.ProcessGroup

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.mesh.pipeline_rank(self.rank) == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.mesh.pipeline_rank(self.rank) == self.mesh.pipeline - 1

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's part of the loss is to be added up: last stage, one of its tensor ranks."""
        return self.is_last_stage and self.mesh.tensor_rank(self.rank) == 0

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return platform.device

    def collective(self) -> dict[str, dist.ProcessGroup]:
        """The groups of several ranks whose members all enter the same collectives, by what they are for.

        The pipeline's is not among them: its ranks send to neighbours, of which those at its ends have fewer.
        """
        job = dist.group.WORLD
        found = {
            "tensor": self.tensor,
            "context": self.context,
            "data": self.data,
            "data x context": self.data_context,
            "expert": self.expert,
            "expert data": self.expert_data,
            "embedding": self.embedding,
            "host": self.host,
            "job": None if job is self.host else job,
        }
        return {name: group for name, group in found.items() if group is not None and group.size() > 1}

    def sum_over_job(self, value: torch.Tensor) -> torch.Tensor:
        """In-place sum over all ranks on the device's backend; for small tensors."""
        if self.mesh.ranks > 1:
            dist.all_reduce(value)
        return value

    def agree_max(self, value: int) -> int:
        """The largest `value` of all ranks, over the host: how ranks agree on a signal or a verdict."""
        if self.mesh.ranks == 1:
            return value
        holder = torch.tensor([value])
        dist.all_reduce(holder, op=dist.ReduceOp.MAX, group=self.host)
        return int(holder)

    def seed_dropout(self, step: int) -> None:
        """Make what dropout draws a function of the run's seed, the step and which part of it is here.

        So a resumed run draws what the unbroken one would have drawn, with no random state to save. The
        tensor ranks draw alike where they hold the same activations, and apart where core forks its tracker.
        """
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        mesh, rank = self.mesh, self.rank
        place = mesh.data_rank(rank), mesh.context_rank(rank), mesh.pipeline_rank(rank)
        digest = hashlib.blake2b(f"dropout:{self.seed}:{step}:{place}".encode(), digest_size=7).digest()
        model_parallel_cuda_manual_seed(int.from_bytes(digest, "little"), te_rng_tracker=False)


def initialize(mesh: Mesh, *, seed: int, timeout_minutes: int = 30) -> Groups:
    """Join the job (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and make all groups.

    Also makes Megatron's random-state tracker, which dropout draws from.
    """
    from megatron.core import parallel_state

    if not dist.is_initialized():
        timeout = datetime.timedelta(minutes=timeout_minutes)
        if mesh.ranks == 1 and "RANK" not in os.environ:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(platform.backend, store=store, rank=0, world_size=1)
        else:
            dist.init_process_group(platform.backend, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=mesh.tensor,
        pipeline_model_parallel_size=mesh.pipeline,
        virtual_pipeline_model_parallel_size=mesh.virtual_pipeline if mesh.virtual_pipeline > 1 else None,
        context_parallel_size=mesh.context,
        expert_model_parallel_size=mesh.expert,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
        order="tp-cp-ep-dp-pp",
    )

    def group(found: object) -> dist.ProcessGroup:  # core's and torch's annotations allow for no group
        assert isinstance(found, dist.ProcessGroup)
        return found

    groups = Groups(
        mesh=mesh,
        rank=dist.get_rank(),
        seed=seed,
        tensor=group(parallel_state.get_tensor_model_parallel_group()),
        context=group(parallel_state.get_context_parallel_group()),
        data=group(parallel_state.get_data_parallel_group()),
        data_context=group(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        expert=group(parallel_state.get_expert_model_parallel_group()),
        expert_data=group(parallel_state.get_expert_data_parallel_group()),
        embedding=_optional(parallel_state.get_embedding_group(check_initialized=False)),
        host=group(dist.group.WORLD if platform.backend == "gloo" else dist.new_group(backend="gloo")),
    )
    groups.seed_dropout(0)
    return groups


def _optional(found: object) -> dist.ProcessGroup | None:
    return found if isinstance(found, dist.ProcessGroup) else None


def shutdown() -> None:
    """Leave the job. A barrier first, so that no rank sees its peers' sockets close in mid-collective."""
    from megatron.core import parallel_state

    if not dist.is_initialized():
        return
    if dist.get_world_size() > 1:
        dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
