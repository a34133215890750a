"""What the training loop costs: `megafab.train.fit` against Megatron's schedule and optimizer alone.

    python tools/bench/overhead.py [--threads 1] [--rounds 8] [--steps 4] [--out FILE]

`fit` runs with everything a user has: loader with prefetch, documents' masks, losses by domain,
metrics.jsonl and wandb (offline) every step. The bare loop is the same model in the same DDP with the same
optimizer (fused Adam, clipping 1.0) and the same cross-entropy; its batches, masks included, are on the
device before it starts, and it logs nothing. Both live in one process and take turns, `--steps` steps at a
time: the block that would start the next plan of `fit` first runs as many bare steps. The fastest block of
each counts. `ratio_cpu` is of the process' CPU seconds, which a busy machine moves less.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common


class Turns:
    """Stands in for a run's `schedules` and lets the bare loop have its turn between two blocks of `fit`.

    Args:
        schedules: the run's own.
        bare: one step of the bare loop.
        steps: of a block.
    """

    def __init__(self, schedules: Any, bare: Callable[[], None], steps: int) -> None:
        self._schedules, self._bare, self._steps = schedules, bare, steps
        self._began = common.clock()
        self.blocks: dict[str, list[common.Clock]] = {"fit": [], "bare": []}

    def at(self, progress: Any) -> Any:
        """The plan of the next step; before every block's first, the bare loop's block."""
        if progress.step % self._steps == 0:
            began = common.clock()
            if progress.step:
                self.blocks["fit"].append(common.passed(self._began, began))
            for _ in range(self._steps):
                self._bare()
            self._began = common.clock()
            self.blocks["bare"].append(common.passed(began, self._began))
        return self._schedules.at(progress)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._schedules, name)


def bare_loop(config: Any, batches: list[Any]) -> Callable[[], None]:
    """One step of Megatron's own parts on a second copy of the model."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from megafab.build import _DTYPES
    from megafab.loss.cross_entropy import token_losses
    from megafab.model import plan as model_plan
    from megafab.model.inputs import ModelInputs
    from megafab.model.shape import ModelShape
    from megafab.topology import groups as topology
    from megafab.topology.mesh import Mesh

    precision = _DTYPES[config.train.precision]
    parallel_state.destroy_model_parallel()  # forgets the run's groups, which the run itself keeps
    groups = topology.initialize(Mesh.of(config.parallel, 1), seed=config.train.seed)
    plan = model_plan.plan(
        ModelShape.of(config.model),
        groups,
        precision=precision,
        recompute="none",
        sequence_parallel=False,
        context_method=config.parallel.context_method,
    )
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=True, use_distributed_optimizer=True
    )
    (chunk,) = model_plan.build(plan, groups, config.train.seed)
    model = DistributedDataParallel(config=plan.transformer, ddp_config=ddp, module=chunk)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=config.optim.lr,
            weight_decay=config.optim.weight_decay,
            clip_grad=config.optim.clip,
            bf16=precision is torch.bfloat16,
            params_dtype=precision,
            use_distributed_optimizer=True,
        ),
        [model],
        use_gloo_process_groups=False,
    )
    for chained in optimizer.chained_optimizers:
        for group in chained.optimizer.param_groups:
            group.update(fused=True, foreach=False)
    plan.transformer.no_sync_func = model.no_sync
    plan.transformer.finalize_model_grads_func = lambda chunks, tokens=None, **kw: finalize_model_grads(
        chunks, None, **kw
    )
    steps = []
    for batch in batches:
        cuts = range(0, batch.tokens_BL.shape[0], config.train.micro_batch)
        rows = [batch.rows(start, start + config.train.micro_batch) for start in cuts]
        micro = [ModelInputs.of(row, groups, config.parallel.context_method) for row in rows]
        steps.append((micro, float(batch.loss_mask_BL.sum())))
    stream = itertools.cycle(steps)
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    forward_backward = get_forward_backward_func()
    no_count = torch.zeros((), dtype=torch.int)

    def forward_step(data: Iterator[tuple[ModelInputs, torch.Tensor]], model: torch.nn.Module):
        x, expected = next(data)
        logits_LBV = model(x.tokens_BL, x.position_BL, x.attention_mask, labels=x.labels_BL)

        def loss(logits_LBV: torch.Tensor):
            nll_BL = token_losses(logits_LBV, x.labels_BL.t(), tensor_group, expected=expected).nll.t()
            return (nll_BL * x.loss_mask_BL).sum(), no_count, {}

        return logits_LBV, loss

    def step() -> None:
        micro, tokens = next(stream)
        expected = torch.tensor(1.0 / tokens)
        plan.transformer.grad_scale_func = lambda loss: loss / tokens
        model.zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter((x, expected) for x in micro),
            model=[model],
            num_microbatches=len(micro),
            seq_length=common.SEQ_LEN,
            micro_batch_size=config.train.micro_batch,
            forward_only=False,
        )
        optimizer.step()

    return step


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both loops, turn by turn, in this process."""
    from megafab.config import load
    from megafab.platform import platform

    platform.start(0, options.threads)
    from megafab.build import build
    from megafab.telemetry.rows import METRICS_FILE, read_rows
    from megafab.train import fit

    with tempfile.TemporaryDirectory() as scratch:
        corpus = common.random_corpus(Path(scratch) / "corpus")
        config = load.load(
            [
                *common.TINY,
                f"train.precision={options.precision}",
                f"train.steps={(options.rounds + 1) * options.steps + 1}",
                f"data.path={corpus.path}",
                f"run.dir={scratch}/run",
                "tracking.mode=offline",
                "eval.samples=0",
                "eval.every=0",
            ]
        )
        run = build(config, ranks=1)
        turns = Turns(run.schedules, bare_loop(config, batches(config, corpus)), options.steps)
        fit(dataclasses.replace(run, schedules=turns))
        logged = len(read_rows(Path(scratch) / "run" / METRICS_FILE))
    assert logged == run.schedules.total_steps, logged
    tokens = options.steps * common.GLOBAL_BATCH * common.SEQ_LEN
    # The first block of each warms up allocator and caches.
    wall, cpu = ({name: [b[i] for b in blocks[1:]] for name, blocks in turns.blocks.items()} for i in (0, 1))
    return {
        "precision": options.precision,
        "threads": options.threads,
        "fit_tokens_per_second": round(tokens / min(wall["fit"])),
        "bare_tokens_per_second": round(tokens / min(wall["bare"])),
        "ratio": round(min(wall["bare"]) / min(wall["fit"]), 4),
        "ratio_cpu": round(min(cpu["bare"]) / min(cpu["fit"]), 4),
        "slowest_block": {name: round(tokens / max(times)) for name, times in wall.items()},
    }


def batches(config: Any, corpus: Any) -> list[Any]:
    """The first steps' batches as `fit` gets them."""
    from megafab.data.loader import Loader
    from megafab.optim.schedules import Schedules
    from megafab.run import Progress

    schedules = Schedules(
        config.train,
        config.optim,
        config.schedule,
        seq_len=config.model.seq_len,
        domain_weights=(1.0,),
        data_ranks=1,
    )
    loader = Loader(
        corpus,
        split="train",
        seed=config.train.seed,
        seq_len=config.model.seq_len,
        packing=config.data.packing,
        data_rank=0,
        data_ranks=1,
        prefetch=False,
    )
    plan = schedules.at(Progress())
    return [loader.take(plan) for _ in range(8)]


def main() -> None:
    """Measure each precision in a process of its own and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10, help="blocks of each loop that count")
    parser.add_argument("--steps", type=int, default=3, help="steps of a block")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="only this one, to stdout")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "overhead.json")
    options = parser.parse_args()
    if options.precision:
        print(json.dumps(measure(options)))
        return
    arguments = [f"--{name}={getattr(options, name)}" for name in ("threads", "rounds", "steps")]
    cases = [common.run(__file__, *arguments, f"--precision={p}") for p in ("fp32", "bf16")]
    result = {
        "command": f"python tools/bench/overhead.py {' '.join(arguments)}",
        "model": common.TINY_TEXT,
        "machine": common.facts(),
        "cases": cases,
    }
    common.save(result, options.out)
    print(report(result))


def report(result: dict[str, Any]) -> str:
    """The numbers as a Markdown table."""
    rows = [
        [
            case["precision"],
            case["bare_tokens_per_second"],
            case["fit_tokens_per_second"],
            case["ratio"],
            case["ratio_cpu"],
        ]
        for case in result["cases"]
    ]
    header = ["precision", "bare loop, tokens/s", "megafab.train.fit, tokens/s", "ratio", "ratio of CPU time"]
    return common.markdown(header, rows)


if __name__ == "__main__":
    main()
