"""Megatron-core's distributed optimizer, around an elementwise optimizer of ours.

Gradients are reduce-scattered, every data rank updates its range of the fp32 masters, and the new weights
are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from megafab.checkpoint.pieces import LogicalTensor
from megafab.engine.config import EngineConfig
from megafab.engine.sharded import Memory, memory_of
from megafab.engine.slices import Slice, is_owner
from megafab.model.tags import TaggedParameter, decays
from megafab.optim import elementwise
from megafab.optim.adamw import AdamW
from megafab.optim.config import OptimConfig
from megafab.optim.lion import Lion
from megafab.topology.groups import Groups


class Distributed:
    """An `engine.sharded.ShardedOptimizer` for AdamW and Lion.

    Args:
        chunks: in core's DDP, with `use_distributed_optimizer`.
        tagged: the parameters of all chunks.
        transformer: core's configuration.
        groups: this rank's place.
        engine, optim: settings.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        tagged: Sequence[TaggedParameter],
        transformer: TransformerConfig,
        groups: Groups,
        engine: EngineConfig,
        optim: OptimConfig,
    ) -> None:
        self._chunks = chunks
        self._core = get_megatron_optimizer(
            _core_config(optim, transformer, engine),
            list[MegatronModule](chunks),
            config_overrides={ParamKey(with_name_predicate=_CONSTANT): _NO_DECAY},
            use_gloo_process_groups=False,
        )
        # Core chains them: one for dense parameters, one for experts.
        chained = self._core.chained_optimizers  # pyright: ignore[reportAttributeAccessIssue]
        self._parts: list[DistributedOptimizer] = [o for o in chained if not o.is_stub_optimizer]
        self._inner = [_replace_inner(part, optim) for part in self._parts]
        self._overlaps = engine.overlap_param_gather
        by_parameter = {id(t.parameter): t for t in tagged}
        self.slices = list(_slices(self._parts, elementwise.MOMENTS[optim.name], by_parameter, groups))

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._core.zero_grad()

    def prepare(self) -> None:
        """Point each master at its range of the reduced gradients."""
        self._core.prepare_grads()

    def gradients(self) -> Sequence[torch.Tensor]:
        """Of `slices`, flat, as views."""
        return [_gradient(s.master) for s in self.slices]

    def step(self, lr: float, weight_decay: float, scale: float) -> None:
        """Update the masters, and the model from them."""
        for group in self._core.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay * group["wd_mult"]
        for part, inner in zip(self._parts, self._inner, strict=True):
            masters = [master for group in inner.param_groups for master in group["params"]]
            elementwise.scale(inner, [_gradient(master) for master in masters], scale)
            inner.step()
            # AdamW has written the model's bf16 weights; fp32 masters are the model's own.
            if not isinstance(inner, AdamW):
                part._copy_main_params_to_model_params()
        if not self._overlaps:  # else they are gathered as the next forward pass needs them
            for chunk in self._chunks:
                chunk.start_param_sync()

    def discard(self) -> None:
        """The buffers are zeroed before they are used again."""

    def set_updates(self, updates: int) -> None:
        """Set the optimizer's counters."""
        for inner in self._inner:
            elementwise.set_updates(inner, updates)

    def commit(self) -> None:
        """Update the model from the masters, on every rank."""
        for part in self._parts:
            part._copy_main_params_to_model_params()
        for chunk in self._chunks:
            chunk.start_param_sync(force_sync=True)

    def factors(self) -> Mapping[str, LogicalTensor]:
        """Elementwise optimizers have no state of other shapes than their parameters'."""
        return {}

    def memory(self) -> Memory:
        """The fp32 masters of an fp32 model are its parameters."""
        return memory_of(
            (parameter.data for chunk in self._chunks for parameter in chunk.parameters()),
            gradient_buffers(self._chunks),
            (tensor for s in self.slices for tensor in (s.master.data, *s.state.values())),
        )


_NO_DECAY: Any = {"wd_mult": 0.0}  # a key that core annotates, but not among its own
_CONSTANT = ParamWithNamePredicate("constant", lambda parameter, name: not decays(name, parameter))


def gradient_buffers(chunks: Sequence[DistributedDataParallel]) -> list[torch.Tensor]:
    """Where core's DDP accumulates."""
    buffers = (b for chunk in chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers))  # pyright: ignore
    return [buffer.grad_data for buffer in buffers]


def _core_config(optim: OptimConfig, transformer: TransformerConfig, engine: EngineConfig) -> OptimizerConfig:
    """What core makes of it steps an AdamW of its own, which `_replace_inner` takes out."""
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        clip_grad=0.0,  # the engine clips, by the norm it was shown
        bf16=transformer.bf16,
        params_dtype=transformer.params_dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=engine.overlap_param_gather,
    )


def _replace_inner(part: DistributedOptimizer, optim: OptimConfig) -> AdamW | Lion:
    """Have core's sharding step the optimizer of the configuration, over the ranges core made."""
    groups = part.optimizer.param_groups
    # Core's fp32 ranges are views of parameters, which torch takes in place of leaves only afterwards.
    leaves = [
        {"params": [p.detach() for p in group["params"]], "wd_mult": group["wd_mult"]} for group in groups
    ]
    inner = elementwise.make(optim, leaves)
    for mine, core in zip(inner.param_groups, groups, strict=True):
        mine["params"] = core["params"]
    elementwise.prime(inner, [p for group in groups for p in group["params"]])
    if isinstance(inner, AdamW):
        for masters, copies in zip(
            part.shard_fp32_from_float16_groups, part.shard_float16_groups, strict=True
        ):
            inner.copies.update(zip(masters, copies, strict=True))
    part.optimizer = inner  # pyright: ignore[reportAttributeAccessIssue]
    return inner


def _gradient(master: torch.Tensor) -> torch.Tensor:
    assert master.grad is not None
    return master.grad


def _slices(
    parts: Sequence[DistributedOptimizer],
    moments: Mapping[str, str],
    tagged: Mapping[int, TaggedParameter],
    groups: Groups,
) -> Iterator[Slice]:
    """The ranges of all parameters that this data rank updates."""
    for part in parts:
        models = part.model_fp32_groups + part.model_float16_groups
        masters = part.shard_fp32_groups + part.shard_fp32_from_float16_groups
        for model_group, master_group in zip(models, masters, strict=True):
            for parameter, master in zip(model_group, master_group, strict=True):
                t = tagged[id(parameter)]
                start = part._get_model_param_range_map(parameter)["param"].start
                state = part.optimizer.state[master]
                named = {kind: state[key] for kind, key in moments.items()}
                yield Slice(t, start, master, named, is_owner(t, groups))
