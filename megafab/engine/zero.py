"""DeepSpeed's ZeRO optimizers, one around each model chunk, driven by Megatron's schedules.

DeepSpeed's own engine wants to own the backward pass, the accumulation and the step, as one; Megatron's
schedules own the first two, and the loop looks at the gradients before it steps. So megafab uses what lies
below DeepSpeed's engine, its ZeRO optimizers, and tells them when a backward pass is over:

- Gradients are sums, not means: DeepSpeed's averaging over data ranks is off, or undone.
- A hook on each chunk's output has the autograd engine call back when that backward pass is done, so that
  stages 2 and 3 close their buckets once a micro-batch, whatever the schedule runs in between.
- Sums over other axes than data (norms under sequence parallelism, tied embeddings over the pipeline) are
  taken last, on this rank's partition alone: they commute with the sum over data ranks, and the ranks they
  join hold the same range of the same parameter. So they are right at every stage of ZeRO, and cost 1/data
  of what they cost on whole gradients.
- Norm, verdict and clipping are megafab's (`slices.py`); DeepSpeed's own are off.

Rajbhandari et al. 2020, arXiv 1910.02054 (ZeRO); Ren et al. 2021, arXiv 2101.06840 (offload).
"""

# DeepSpeed is not typed.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportPrivateImportUsage=false

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megafab.checkpoint.pieces import LogicalTensor
from megafab.engine.config import EngineConfig, Offload
from megafab.engine.sharded import Memory, memory_of
from megafab.engine.slices import Slice, is_owner
from megafab.model.gpt import GPT
from megafab.model.tags import TaggedParameter, decays
from megafab.optim import elementwise
from megafab.optim.config import OptimConfig
from megafab.platform import platform
from megafab.topology.groups import Groups

_EXPERTS = "experts"  # DeepSpeed's name for the process groups of expert parameters
_PERSISTENT = 100_000  # DeepSpeed's default of `param_persistence_threshold`


class Zero:
    """An `engine.sharded.ShardedOptimizer`: a ZeRO optimizer around each chunk.

    Args:
        chunks: this rank's model chunks; their backward passes are watched from now on.
        tagged: the parameters of each chunk.
        groups: this rank's place.
        engine, optim: settings.
    """

    def __init__(
        self,
        chunks: Sequence[GPT],
        tagged: Sequence[Sequence[TaggedParameter]],
        groups: Groups,
        engine: EngineConfig,
        optim: OptimConfig,
    ) -> None:
        _join()
        self._groups = groups
        kind = _Stage3 if engine.zero_stage == 3 else _Stage12
        self._parts = [
            kind(chunk, parameters, groups, engine, optim)
            for chunk, parameters in zip(chunks, tagged, strict=True)
        ]
        for chunk, part in zip(chunks, self._parts, strict=True):
            _watch(chunk, part.end_backward)
        self.slices = [s for part in self._parts for s in part.slices]

    def no_sync(self) -> list[Callable[[], contextlib.AbstractContextManager[None]]]:
        """By chunk, what a schedule enters for all backward passes but the last."""
        return [part.no_sync for part in self._parts]

    def reduce(self) -> None:
        """All backward passes are over: sum the gradients over the job. A collective."""
        for part in self._parts:
            part.reduce()
        _sum_over_other_axes(list(zip(self.slices, self.gradients(), strict=True)), self._groups)

    def zero_grad(self) -> None:
        """There are none: `step` or `discard` came before."""

    def prepare(self) -> None:
        """They are where they are needed."""

    def gradients(self) -> Sequence[torch.Tensor]:
        """Of `slices`, flat, as views; between `reduce` and `step` or `discard`."""
        return [gradient for part in self._parts for gradient in part.gradients()]

    def step(self, lr: float, weight_decay: float, scale: float) -> None:
        """Update the masters, and the model from them."""
        for part in self._parts:
            elementwise.scale(part.inner, part.gradients(), scale)
            part.step(lr, weight_decay)

    def discard(self) -> None:
        """Forget the gradients."""
        for part in self._parts:
            part.discard()

    def set_updates(self, updates: int) -> None:
        """Set the optimizer's counters."""
        for part in self._parts:
            elementwise.set_updates(part.inner, updates)

    def commit(self) -> None:
        """Update the model from the masters, on every rank."""
        for part in self._parts:
            part.commit()

    def factors(self) -> Mapping[str, LogicalTensor]:
        """Elementwise optimizers have no state of other shapes than their parameters'."""
        return {}

    def memory(self) -> Memory:
        """On the accelerator and, with offload, in the host's memory."""
        return memory_of(
            (tensor for part in self._parts for tensor in part.parameter_storage()),
            (tensor for part in self._parts for tensor in part.gradient_storage()),
            (tensor for s in self.slices for tensor in (s.master, *s.state.values())),
        )


def _watch(chunk: GPT, end: Callable[[], None]) -> None:
    """Have `end` called when a backward pass through the chunk is over."""
    engine = torch.autograd.Variable._execution_engine

    def watch(_module: GPT, _inputs: object, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _gradient: engine.queue_callback(end))

    chunk.register_forward_hook(watch)


def _join() -> None:
    """Have DeepSpeed talk over the process groups of this job, which exist already."""
    os.environ.setdefault("DS_ACCELERATOR", platform.device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # of a job of one rank, which nothing launched
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed.comm.comm as comm

    if not platform.is_cuda:
        # It would compile a shared-memory all-reduce that nothing here asks for (25 s on a new machine).
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    comm.cdb = None  # of an earlier job of this process
    comm.init_distributed(dist_backend=platform.backend, auto_mpi_discovery=False, verbose=False)


def _param_groups(tagged: Sequence[TaggedParameter]) -> list[dict[str, Any]]:
    """The chunk's parameters by how they are sharded and whether they decay.

    A shared embedding stands alone, so that it is cut alike on the first and the last stage, which share it.
    """
    chosen: dict[tuple[bool, bool, bool], list[torch.nn.Parameter]] = {}
    for t in tagged:
        if t.parameter.requires_grad:
            key = (t.expert, t.shared, decays(t.name, t.parameter))
            chosen.setdefault(key, []).append(t.parameter)
    groups = []
    for (expert, _, decaying), parameters in chosen.items():
        group: dict[str, Any] = {"params": parameters, "wd_mult": float(decaying)}
        if expert:
            group.update(moe=True, name=_EXPERTS)
            for parameter in parameters:
                parameter.group_name = _EXPERTS
        groups.append(group)
    return groups


def _offload(engine: EngineConfig) -> tuple[Any, Any]:
    """DeepSpeed's settings of optimizer and parameter offload, or None."""
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    where = {"device": "cpu", "pin_memory": platform.is_cuda}
    optimizer = DeepSpeedZeroOffloadOptimizerConfig(**where) if engine.offload is not Offload.none else None
    parameters = DeepSpeedZeroOffloadParamConfig(**where) if engine.offload is Offload.parameters else None
    return optimizer, parameters


class _Part:
    """A chunk and its ZeRO optimizer: what all stages share.

    `inner` is the torch optimizer within, over this rank's partitions.
    """

    def __init__(
        self, tagged: Sequence[TaggedParameter], groups: Groups, engine: EngineConfig, optim: OptimConfig
    ) -> None:
        from deepspeed.utils.timer import NoopTimer

        self._groups = groups
        self._tagged = {id(t.parameter): t for t in tagged}
        self._moments = elementwise.MOMENTS[optim.name]
        self.inner = elementwise.make(optim, _param_groups(tagged))
        self._offloaded = engine.offload is not Offload.none
        # What DeepSpeed's optimizers of all stages are told alike.
        self._settings: dict[str, Any] = {
            "timers": NoopTimer(),
            "contiguous_gradients": True,
            "reduce_bucket_size": min(engine.bucket_parameters, sum(t.parameter.numel() for t in tagged)),
            "dp_process_group": groups.data_context,
            "reduce_scatter": True,
            "overlap_comm": engine.overlap_grad_reduce,
            "offload_optimizer_config": _offload(engine)[0],
            "gradient_accumulation_dtype": torch.float32,
            "communication_data_type": torch.float32,
            "clip_grad": 0.0,
        }

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Around all backward passes of a step but the last."""
        yield

    def _set_hyperparameters(self, lr: float, weight_decay: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay * group["wd_mult"]

    def _slice(self, t: TaggedParameter, start: int, master: torch.Tensor, offset: int, size: int) -> Slice:
        state = self.inner.state[master]
        named = {name: state[key].narrow(0, offset, size) for name, key in self._moments.items()}
        view = master.detach().narrow(0, offset, size)
        return Slice(t, start, view, named, is_owner(t, self._groups))


class _Stage12(_Part):
    """Stages 1 and 2: each data rank updates a contiguous range of every parameter group."""

    def __init__(
        self,
        chunk: GPT,
        tagged: Sequence[TaggedParameter],
        groups: Groups,
        engine: EngineConfig,
        optim: OptimConfig,
    ) -> None:
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        super().__init__(tagged, groups, engine, optim)
        self._partitions_gradients = engine.zero_stage == 2
        self._overlaps = engine.overlap_grad_reduce
        self._zero = DeepSpeedZeroOptimizer(
            self.inner,
            {t.parameter: t.name for t in tagged},
            optimizer_params={},
            allgather_bucket_size=2 * engine.bucket_parameters,
            expert_parallel_group={_EXPERTS: groups.expert},
            expert_data_parallel_group={_EXPERTS: groups.expert_data},
            has_moe_layers=any(t.expert for t in tagged),
            gradient_average=False,
            partition_grads=self._partitions_gradients,
            check_grad_overflow=False,
            compute_grad_norm=self._offloaded,  # offload insists on it
            **self._settings,
        )
        self._zero.set_gradient_accumulation_boundary(False)
        masters = self._zero.single_partition_of_fp32_groups
        elementwise.prime(self.inner, masters)
        self._pieces = list(self._ranges())  # as `slices`: group and offset in its partition
        self.slices = [
            self._slice(t, start, masters[group], offset, size)
            for t, group, start, offset, size in self._pieces
        ]

    def _ranges(self) -> Iterator[tuple[TaggedParameter, int, int, int, int]]:
        """(parameter, group, start in the parameter, offset in this rank's partition, size)."""
        zero = self._zero
        for group, parameters in enumerate(zero.params_in_partition):
            rank = dist.get_rank(zero.real_dp_process_group[group])
            for parameter in parameters:
                key = zero.get_param_id(parameter)
                start = int(zero.grad_start_offset[group][rank][key])
                offset = int(zero.grad_partition_insertion_offset[group][rank][key])
                size = min(parameter.numel() - start, int(zero.partition_size[group]) - offset)
                yield self._tagged[id(parameter)], group, start, offset, size

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Stage 1 reduces once a step: buckets that overlap it with the last backward pass begin then."""
        self._zero.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._zero.set_gradient_accumulation_boundary(self._overlaps and not self._partitions_gradients)

    def end_backward(self) -> None:
        """One backward pass through the chunk is over."""
        if self._partitions_gradients:
            self._require_all_gradients()
            self._zero.overlapping_partition_gradients_reduce_epilogue()

    def reduce(self) -> None:
        """Sum what was accumulated over the data ranks."""
        if self._partitions_gradients:
            self._zero.finalize_gradient_accumulation_boundary()
        else:
            self._zero.set_gradient_accumulation_boundary(True)
            self._zero.reduce_gradients()
            self._zero.zero_grad()  # what other ranks update

    def _require_all_gradients(self) -> None:
        """Ranks reduce buckets in the order in which gradients came: all must have had the same ones."""
        reduced = sum(self._zero.params_already_reduced)
        waiting = sum(len(bucket.params) for bucket in self._zero.ipg_buckets.values())
        assert reduced + waiting == len(self._zero.param_dict), "a parameter took no part in a backward pass"

    def gradients(self) -> Sequence[torch.Tensor]:
        """Of `slices`, flat, as views."""
        if self._offloaded:
            masters = self._zero.single_partition_of_fp32_groups
            return [masters[g].grad.narrow(0, offset, size) for _, g, _, offset, size in self._pieces]
        # Behind the parameters' pieces a group may have padding.
        pieces = [
            piece
            for group, parameters in enumerate(self._zero.params_in_partition)
            for piece in self._zero.averaged_gradients[group][: len(parameters)]
        ]
        return [piece.view(-1) for piece in pieces]

    def step(self, lr: float, weight_decay: float) -> None:
        self._set_hyperparameters(lr, weight_decay)
        self._zero.step()
        self._zero.zero_grad()
        self._zero.set_gradient_accumulation_boundary(False)

    def discard(self) -> None:
        zero = self._zero
        zero.set_gradient_accumulation_boundary(False)
        zero.micro_step_id = -1
        zero.zero_grad()
        zero._release_preflattened_grad_buffers()
        if self._offloaded:
            zero._offload_accumulated_param_ids = set()
            zero.reset_cpu_buffers()
        for group in zero.averaged_gradients:
            zero.averaged_gradients[group] = None
            zero.all_grad_tensors[group] = None

    def commit(self) -> None:
        self._zero.update_lp_params()

    def parameter_storage(self) -> Iterator[torch.Tensor | None]:
        yield from self._zero.bit16_groups_flat

    def gradient_storage(self) -> Iterator[torch.Tensor | None]:
        for group in self._zero.bit16_groups:
            for parameter in group:
                yield from (parameter.grad, parameter.grad_accum)
        accumulated = self._zero.all_grad_tensors, self._zero.averaged_gradients
        for pieces in (pieces for by_group in accumulated for pieces in by_group.values()):
            yield from pieces or ()
        if self._offloaded:
            yield from (master.grad for master in self._zero.single_partition_of_fp32_groups)


class _Stage3(_Part):
    """Stage 3: each data rank holds a range of every parameter, gathered while a layer needs it."""

    def __init__(
        self,
        chunk: GPT,
        tagged: Sequence[TaggedParameter],
        groups: Groups,
        engine: EngineConfig,
        optim: OptimConfig,
    ) -> None:
        from deepspeed.runtime.zero.partition_parameters import register_external_parameter
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

        super().__init__(tagged, groups, engine, optim)
        _, parameter_offload = _offload(engine)
        config = _stage3_config(parameter_offload)
        _partition(chunk, groups, config)
        persistent = engine.persistent_parameters
        self._zero = DeepSpeedZeroOptimizer_Stage3(
            chunk,
            self.inner,
            {t.parameter: t.name for t in tagged},
            ds_config=config,
            prefetch_bucket_size=engine.bucket_parameters,
            param_persistence_threshold=_PERSISTENT if persistent is None else persistent,
            offload_ratio=1.0,
            offload_param_config=parameter_offload,
            **self._settings,
        )
        if chunk.post_process and chunk.share_embeddings_and_output_weights:
            register_external_parameter(chunk.output_layer, chunk.shared_embedding_or_output_weight())
        masters = self._zero.fp32_partitioned_groups_flat
        elementwise.prime(self.inner, masters)
        self._pieces = list(self._ranges())  # as `slices`: sub-group and index in it
        self.slices = [
            self._slice(t, start, masters[group], offset, size)
            for t, group, _, start, offset, size in self._pieces
        ]

    def _ranges(self) -> Iterator[tuple[TaggedParameter, int, int, int, int, int]]:
        """(parameter, sub-group, index in it, start in the parameter, offset in the partition, size)."""
        for group, parameters in enumerate(self._zero.fp16_groups):
            for index, parameter in enumerate(parameters):
                rank = dist.get_rank(parameter.ds_process_group)
                _, offset, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
                start = rank * padded
                size = min(padded, parameter.ds_numel - start)
                if size > 0:
                    yield self._tagged[id(parameter)], group, index, start, int(offset), size

    def end_backward(self) -> None:
        self._zero.independent_gradient_partition_epilogue()
        self._zero.backward_epilogue()
        self._zero.micro_step_id += 1  # the next backward pass adds to this one

    def reduce(self) -> None:
        self._zero.finalize_gradient_accumulation_boundary()
        # DeepSpeed has taken means.
        sizes = [t.parameter.ds_process_group.size() for t, *_ in self._pieces]
        torch._foreach_mul_(list(self.gradients()), [float(size) for size in sizes])

    def gradients(self) -> Sequence[torch.Tensor]:
        if self._offloaded:
            masters = self._zero.fp32_partitioned_groups_flat
            return [
                masters[group].grad.narrow(0, offset, size) for _, group, _, _, offset, size in self._pieces
            ]
        return [
            self._zero.averaged_gradients[group][index].view(-1)[:size]
            for _, group, index, _, _, size in self._pieces
        ]

    def step(self, lr: float, weight_decay: float) -> None:
        self._set_hyperparameters(lr, weight_decay)
        self._zero.set_gradient_accumulation_boundary(False)
        self._zero.step()

    def discard(self) -> None:
        self._zero.set_gradient_accumulation_boundary(False)
        self._zero._pre_step()
        self._zero._partition_all_parameters()
        self._zero._overflow_clean_up(1.0)
        self._gather_persistent()

    def commit(self) -> None:
        self._zero._partition_all_parameters()
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._gather_persistent()

    def parameter_storage(self) -> Iterator[torch.Tensor | None]:
        for group in self._zero.fp16_groups:
            for parameter in group:
                yield from (parameter.ds_tensor, parameter.data)

    def gradient_storage(self) -> Iterator[torch.Tensor | None]:
        for pieces in self._zero.averaged_gradients.values():
            yield from pieces or ()
        if self._offloaded:
            yield from (master.grad for master in self._zero.fp32_partitioned_groups_flat)

    def _gather_persistent(self) -> None:
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)


def _partition(chunk: GPT, groups: Groups, config: dict[str, Any]) -> None:
    """Cut every parameter over the ranks that hold copies of it.

    Left to itself, DeepSpeed takes all ranks of the job, and would mix the slices of tensor ranks.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    for name, module in chunk.named_modules():
        if name.endswith(".mlp.experts"):
            Init(module, groups.expert_data, config_dict_or_path=config)
    Init(chunk, groups.data_context, config_dict_or_path=config)


def _stage3_config(parameter_offload: Any) -> dict[str, Any]:
    """What DeepSpeed wants to read where it partitions the parameters."""
    zero: dict[str, Any] = {
        "stage": 3,
        "memory_efficient_linear": False,  # it would replace torch's linear in the whole process
    }
    if parameter_offload is not None:
        zero["offload_param"] = {"device": "cpu", "pin_memory": platform.is_cuda}
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}


def _sum_over_other_axes(gradients: Sequence[tuple[Slice, torch.Tensor]], groups: Groups) -> None:
    """Add up gradients of which each tensor rank, or each of the two outer stages, has a part. In place.

    Args:
        gradients: of all slices of this rank, summed over the data ranks.
        groups: this rank's place.
    """
    if groups.mesh.tensor > 1:
        _sum([g for s, g in gradients if s.tagged.tensor_partial], groups.tensor, groups.device)
    if groups.mesh.pipeline > 1 and groups.embedding is not None:
        _sum([g for s, g in gradients if s.tagged.shared], groups.embedding, groups.device)


def _sum(tensors: list[torch.Tensor], group: dist.ProcessGroup, device: torch.device) -> None:
    if tensors:
        flat = torch.cat(tensors).to(device)
        dist.all_reduce(flat, group=group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, list(parts))
