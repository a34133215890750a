"""`engine=megatron`: Megatron-core's data parallel buffers and its distributed optimizer.

Gradients accumulate in fp32 buffers, are reduce-scattered bucket by bucket while backward goes on, and
every data rank updates its slice of the fp32 master weights; the new weights are then gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import MegatronModule

from megafab.checkpoint.pieces import LogicalTensor
from megafab.engine.base import LossFunction, WeightEditor
from megafab.engine.config import EngineConfig
from megafab.engine.schedule import Schedule
from megafab.engine.slices import MasterWeights, Slice, global_norm, is_owner
from megafab.loss.ledger import LossLedger
from megafab.model.gpt import GPT
from megafab.model.plan import ModelPlan
from megafab.model.tags import TaggedParameter, tag_all
from megafab.optim import elementwise
from megafab.optim.config import OptimConfig
from megafab.run import Action, Batch, GradStats, StepOutcome, StepPlan, Verdict
from megafab.techniques.base import Clock
from megafab.topology.config import ContextMethod
from megafab.topology.groups import Groups


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
        tagged = {id(t.parameter): t for t in tag_all(chunks, groups)}
        self._chunks = _wrap(chunks, plan, engine)
        self._optimizer = get_megatron_optimizer(
            _optimizer_config(optim, plan, engine),
            list[MegatronModule](self._chunks),
            use_gloo_process_groups=False,
        )
        _replace_inner(self._optimizer, optim)
        slices = _slices(self._optimizer, elementwise.MOMENTS[optim.name], tagged, groups)
        self._masters = MasterWeights(slices, self._gather_weights)
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
        self._optimizer.prepare_grads()
        norm = global_norm(((s, _gradient(s)) for s in self._masters.slices.values()), self._groups)
        return GradStats(norm, math.isfinite(norm))

    def update(self, plan: StepPlan, verdict: Verdict, stats: GradStats) -> StepOutcome:
        """Scale, clip and step; or leave everything as it was."""
        norm = stats.norm
        if verdict.action is Action.SKIP:
            return StepOutcome(False, verdict, norm)
        scale = verdict.scale if verdict.action is Action.SCALE else 1.0
        if self._clip and norm * abs(scale) > self._clip:
            scale *= self._clip / (norm * abs(scale) + 1e-6)
        if scale != 1.0:
            torch._foreach_mul_([_gradient(s) for s in self._masters.slices.values()], scale)  # pyright: ignore
        for group in self._optimizer.param_groups:
            group["lr"] = plan.lr
            group["weight_decay"] = plan.weight_decay * group["wd_mult"]
        self._optimizer.step_with_ready_grads()
        self._updates += 1
        return StepOutcome(True, verdict, norm)

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
        """The count of updates, from which Adam's bias correction follows."""
        return {"updates": self._updates}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The optimizer's counters from the count of updates, the model's copies from the masters."""
        self._updates = state["updates"]
        for distributed in _distributed_optimizers(self._optimizer):
            elementwise.set_updates(distributed.optimizer, self._updates)
        self._gather_weights()

    def _gather_weights(self) -> None:
        """Copy masters to the model, on every rank."""
        for distributed in _distributed_optimizers(self._optimizer):
            distributed._copy_main_params_to_model_params()
        for chunk in self._chunks:
            chunk.start_param_sync(force_sync=True)


def _wrap(chunks: Sequence[GPT], plan: ModelPlan, engine: EngineConfig) -> list[DistributedDataParallel]:
    """Give every chunk its gradient and parameter buffers, and the schedule its hooks into them."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=engine.overlap_grad_reduce,
        overlap_param_gather=engine.overlap_param_gather,
        use_distributed_optimizer=True,
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


def _optimizer_config(optim: OptimConfig, plan: ModelPlan, engine: EngineConfig) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=0.0,  # `update` clips, by the norm it was shown
        bf16=plan.transformer.bf16,
        params_dtype=plan.transformer.params_dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=engine.overlap_param_gather,
    )


def _distributed_optimizers(optimizer) -> list[DistributedOptimizer]:
    """The optimizers core chains: one for dense parameters, one for experts."""
    return [o for o in optimizer.chained_optimizers if not o.is_stub_optimizer]


def _replace_inner(optimizer, optim: OptimConfig) -> None:
    """Have core's sharding step the optimizer of the configuration, over the ranges core made."""
    for distributed in _distributed_optimizers(optimizer):
        groups = distributed.optimizer.param_groups
        # Core's fp32 ranges are views of parameters, which torch takes in place of leaves only afterwards.
        leaves = [
            {"params": [p.detach() for p in group["params"]], "wd_mult": group["wd_mult"]} for group in groups
        ]
        inner = elementwise.make(optim, leaves)
        for mine, core in zip(inner.param_groups, groups, strict=True):
            mine["params"] = core["params"]
        elementwise.prime(inner, [p for group in groups for p in group["params"]])
        distributed.optimizer = inner  # pyright: ignore[reportAttributeAccessIssue]


def _gradient(s: Slice) -> torch.Tensor:
    assert s.master.grad is not None
    return s.master.grad


def _slices(
    optimizer, moments: Mapping[str, str], tagged: Mapping[int, TaggedParameter], groups: Groups
) -> Iterator[Slice]:
    """The ranges of all parameters that this data rank updates."""
    for distributed in _distributed_optimizers(optimizer):
        models = distributed.model_fp32_groups + distributed.model_float16_groups
        masters = distributed.shard_fp32_groups + distributed.shard_fp32_from_float16_groups
        for model_group, master_group in zip(models, masters, strict=True):
            for parameter, master in zip(model_group, master_group, strict=True):
                t = tagged[id(parameter)]
                start = distributed._get_model_param_range_map(parameter)["param"].start
                state = distributed.optimizer.state[master]
                named = {kind: state[key] for kind, key in moments.items()}
                yield Slice(t, start, master, named, is_owner(t, groups))
