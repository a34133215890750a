"""`engine=megatron`: Megatron-core's data parallel buffers and its distributed optimizer.

Gradients accumulate in fp32 buffers, are reduce-scattered bucket by bucket while backward goes on, and
every data rank updates its slice of the fp32 master weights; the new weights are then gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import megatron.core.optimizer as core_optimizer
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import MegatronModule

from megafab.checkpoint.pieces import LogicalTensor, flat_slice
from megafab.engine.base import LossFunction, WeightEditor
from megafab.engine.config import EngineConfig
from megafab.engine.schedule import Schedule
from megafab.loss.ledger import LossLedger
from megafab.model.gpt import GPT
from megafab.model.plan import ModelPlan
from megafab.model.tags import TaggedParameter, tag_all
from megafab.optim.config import OptimConfig
from megafab.run import Action, Batch, GradStats, StepOutcome, StepPlan, Verdict
from megafab.techniques.base import Clock
from megafab.topology.config import ContextMethod
from megafab.topology.groups import Groups


@dataclass(frozen=True, slots=True, eq=False)
class _Slice:
    """A data rank's range of one flattened parameter, with the optimizer's view of it."""

    tagged: TaggedParameter
    master: torch.Tensor  # fp32 [n], what Adam updates
    start: int  # of the range in the flattened local parameter
    state: dict[str, torch.Tensor]  # Adam's: step, exp_avg, exp_avg_sq
    owner: bool  # whether this rank writes it to a checkpoint

    def describe(self, value: torch.Tensor) -> LogicalTensor:
        return flat_slice(value, self.start, self.tagged.layout, self.owner)


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
        # Torch's fused AdamW whatever else is installed: one layout of state in checkpoints.
        core_optimizer.USING_PYTORCH_OPTIMIZER = True
        self._optimizer = get_megatron_optimizer(
            _optimizer_config(optim, plan, engine),
            list[MegatronModule](self._chunks),
            use_gloo_process_groups=False,
        )
        _prime(self._optimizer)
        self._slices = {s.tagged.name: s for s in _slices(self._optimizer, tagged, groups)}
        self._updates = 0
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
        norm = float(self._optimizer.get_grad_norm())
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
            torch._foreach_mul_([s.master.grad for s in self._slices.values()], scale)  # pyright: ignore
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
        """The master weights of this rank: the engine is its own editor."""
        return self

    def names(self) -> Sequence[str]:
        """Global names of the parameters of which this rank holds a range."""
        return list(self._slices)

    def master(self, name: str) -> torch.Tensor:
        """This rank's range of the fp32 master, flat."""
        return self._slices[name].master.data

    def describe(self, name: str, value: torch.Tensor) -> LogicalTensor:
        """`value`, shaped like `master(name)`, as part of a logical tensor like the parameter."""
        return self._slices[name].describe(value)

    def commit(self) -> None:
        """Make the model compute with the masters as they are now, on every rank."""
        for optimizer in _distributed_optimizers(self._optimizer):
            optimizer._copy_main_params_to_model_params()
        for chunk in self._chunks:
            chunk.start_param_sync(force_sync=True)

    def sharded_state(self) -> Mapping[str, LogicalTensor]:
        """Masters and Adam's moments by global name."""
        state = {}
        for name, s in self._slices.items():
            state[f"weight/{name}"] = s.describe(s.master.data)
            state[f"adam_m/{name}"] = s.describe(s.state["exp_avg"])
            state[f"adam_v/{name}"] = s.describe(s.state["exp_avg_sq"])
        return state

    def state_dict(self) -> dict[str, int]:
        """The count of updates, from which Adam's bias correction follows."""
        return {"updates": self._updates}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Adam's counters from the count of updates, the model's copies from the masters."""
        self._updates = state["updates"]
        for s in self._slices.values():
            # Each parameter its own counter: one shared tensor would be advanced once per parameter.
            s.state["step"].fill_(self._updates)
        self.commit()


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


def _prime(optimizer) -> None:
    """Create Adam's state now, so that it can be saved and loaded before the first step."""
    for distributed in _distributed_optimizers(optimizer):
        for group in distributed.optimizer.param_groups:
            group.update(fused=True, foreach=False)  # one pass over memory, on CPU and GPU
            for parameter in group["params"]:
                distributed.optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _slices(optimizer, tagged: Mapping[int, TaggedParameter], groups: Groups) -> Iterator[_Slice]:
    """The ranges of all parameters that this data rank updates."""
    mesh, rank = groups.mesh, groups.rank
    for distributed in _distributed_optimizers(optimizer):
        models = distributed.model_fp32_groups + distributed.model_float16_groups
        masters = distributed.shard_fp32_groups + distributed.shard_fp32_from_float16_groups
        for model_group, master_group in zip(models, masters, strict=True):
            for parameter, master in zip(model_group, master_group, strict=True):
                t = tagged[id(parameter)]
                start = distributed._get_model_param_range_map(parameter)["param"].start
                # What every tensor rank holds whole is written by the first; a tied copy by the embedding.
                owner = not t.tied and (t.tensor_split or t.expert or mesh.tensor_rank(rank) == 0)
                yield _Slice(t, master, start, distributed.optimizer.state[master], owner)
