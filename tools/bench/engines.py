"""What the engines cost at data parallel 2, beside a bare DeepSpeed loop, and what checking copies costs.

    python tools/bench/engines.py [--rounds 6] [--steps 3] [--precision fp32] [--out FILE]

Two ranks on this machine, one thread each. Every case steps the same model on the same batches, gradients
clipped to 1.0, fused AdamW: the Megatron engine, ZeRO 1, 2 and 3 of the DeepSpeed engine (forward_backward,
gradient_stats, update: what the loop calls), and `deepspeed.initialize` with ZeRO 1 as its documentation
drives it. The cases take turns, some steps at a time; the fastest turn of each counts.
`invariants_seconds` is one comparison of all copies (`resilience/invariants.py`); `invariants_share` is that
over the steps between two at the default cadence.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

RANKS = 2
CASES = {
    "megatron": ["engine=megatron"],
    "ZeRO 1": ["engine=deepspeed", "engine.zero_stage=1"],
    "ZeRO 2": ["engine=deepspeed", "engine.zero_stage=2"],
    "ZeRO 3": ["engine=deepspeed", "engine.zero_stage=3"],
}
BARE = "bare DeepSpeed, ZeRO 1"


def bare_deepspeed(config: Any, batches: list[Any]) -> Callable[[], None]:
    """One step as DeepSpeed's documentation writes it, on the same chunk of the same model."""
    import deepspeed
    import torch

    from megafab.build import _DTYPES
    from megafab.loss.cross_entropy import token_losses
    from megafab.model import plan as model_plan
    from megafab.model.inputs import ModelInputs
    from megafab.model.shape import ModelShape
    from megafab.optim import elementwise
    from megafab.topology import groups as topology
    from megafab.topology.mesh import Mesh

    groups = topology.initialize(Mesh.of(config.parallel, RANKS), seed=config.train.seed)
    plan = model_plan.plan(
        ModelShape.of(config.model),
        groups,
        precision=_DTYPES[config.train.precision],
        recompute="none",
        sequence_parallel=False,
        context_method=config.parallel.context_method,
    )
    (chunk,) = model_plan.build(plan, groups, config.train.seed)

    class WithLoss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chunk = chunk

        def forward(self, x: ModelInputs) -> torch.Tensor:
            logits_LBV = self.chunk(x.tokens_BL, x.position_BL, x.attention_mask, labels=x.labels_BL)
            tokens = x.loss_mask_BL.sum()
            expected = 1.0 / (tokens * count)  # DeepSpeed divides by the micro-batches
            nll_BL = token_losses(logits_LBV, x.labels_BL.t(), groups.tensor, expected=expected).nll.t()
            return (nll_BL * x.loss_mask_BL).sum() / tokens

    decayed = [p for p in chunk.parameters() if p.dim() > 1]
    plain = [p for p in chunk.parameters() if p.dim() <= 1]
    micro, count = config.train.micro_batch, config.train.global_batch // RANKS // config.train.micro_batch
    engine, *_ = deepspeed.initialize(
        model=WithLoss(),
        optimizer=elementwise.make(
            config.optim, [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        ),
        config={
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": count,
            "gradient_clipping": config.optim.clip,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 1},
            **({"bf16": {"enabled": True}} if config.train.precision.value == "bf16" else {}),
        },
    )
    steps = [
        [
            ModelInputs.of(batch.rows(start, start + micro), groups, config.parallel.context_method)
            for start in range(0, batch.tokens_BL.shape[0], micro)
        ]
        for batch in batches
    ]
    turn = [0]

    def step() -> None:
        for x in steps[turn[0] % len(steps)]:
            engine.backward(engine(x))
            engine.step()
        turn[0] += 1

    return step


def ours(run: Any, batches: list[Any]) -> Callable[[], None]:
    """One step of an engine, by the calls of the loop."""
    from megafab.run import Progress, Verdict

    plan, turn = run.schedules.at(Progress()), [0]

    def step() -> None:
        run.engine.forward_backward(batches[turn[0] % len(batches)], plan, run.bus.loss)
        run.engine.update(plan, Verdict(), run.engine.gradient_stats())
        turn[0] += 1

    return step


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All cases, turn by turn, on this rank."""
    from megafab.config import load
    from megafab.platform import platform

    rank = int(os.environ["RANK"])
    platform.start(rank, 1)
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megafab.build import build
    from megafab.run import Progress

    steps: dict[str, Callable[[], None]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        corpus = common.random_corpus(Path(scratch) / "corpus")
        runs = []
        for name, overrides in CASES.items():
            config = load.load(
                [
                    *common.TINY,
                    *("train.micro_batch=2", f"train.precision={options.precision}", "train.steps=1000"),
                    *(f"data.path={corpus.path}", f"run.dir={scratch}/{len(runs)}", "tracking=none"),
                    *("eval.samples=0", "eval.every=0", "data.prefetch=false", *overrides),
                ]
            )
            if runs:
                parallel_state.destroy_model_parallel()  # the earlier runs keep their groups
            run = build(config, ranks=RANKS, message=lambda _: None)
            plan = run.schedules.at(Progress())
            batches = [run.loader.take(plan) for _ in range(4)]
            steps[name] = ours(run, batches)
            runs.append(run)
        parallel_state.destroy_model_parallel()
        steps[BARE] = bare_deepspeed(config, batches)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        checks = []
        for number in range(options.rounds + 1):
            for name, step in steps.items():
                dist.barrier()
                began = time.perf_counter()
                for _ in range(options.steps):
                    step()
                dist.barrier()
                if number:  # the first turn warms up allocator and caches
                    seconds[name].append((time.perf_counter() - began) / options.steps)
            dist.barrier()
            began = time.perf_counter()
            runs[0].invariants.check(0, saving=True)
            checks.append(time.perf_counter() - began)
        every = config.resilience.check_every
    tokens = common.GLOBAL_BATCH * common.SEQ_LEN
    fastest = {name: min(times) for name, times in seconds.items()}
    return {
        "precision": options.precision,
        "tokens_per_second": {name: round(tokens / best) for name, best in fastest.items()},
        "over_bare_deepspeed": {
            name: round(fastest[BARE] / best, 4) for name, best in fastest.items() if name != BARE
        },
        "slowest_turn": {name: round(tokens / max(times)) for name, times in seconds.items()},
        "invariants_seconds": round(min(checks), 6),
        "invariants_share": round(min(checks) / (every * fastest["megatron"]), 6),
    }


def main() -> None:
    """Measure both precisions, each on ranks of its own, and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="turns of each case that count")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="only this one, as a rank")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "engines.json")
    options = parser.parse_args()
    if options.precision:
        result = measure(options)
        if os.environ["RANK"] == "0":
            print(json.dumps(result), flush=True)
        os._exit(0)  # gloo's threads and DeepSpeed's hooks need no farewell
    arguments = [f"--{name}={getattr(options, name)}" for name in ("rounds", "steps")]
    result = {
        "command": f"python tools/bench/engines.py {' '.join(arguments)}",
        "model": common.TINY_TEXT.replace(f"micro-batch {common.MICRO_BATCH}", "micro-batch 2")
        + f", {RANKS} ranks",
        "machine": common.facts(),
        "cases": [on_ranks(*arguments, f"--precision={p}") for p in ("fp32", "bf16")],
    }
    common.save(result, options.out)
    print(report(result))


def on_ranks(*arguments: str) -> Any:
    """One case on ranks of its own: what rank 0 says in JSON."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env={**os.environ, **job, "OMP_NUM_THREADS": "1", "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(RANKS)
    ]
    output, *_ = [rank.communicate()[0] for rank in ranks]
    return json.loads(output.splitlines()[-1])


def report(result: dict[str, Any]) -> str:
    """The numbers as a Markdown table."""
    rows = [
        [case["precision"], name, speed, case["over_bare_deepspeed"].get(name, 1.0)]
        for case in result["cases"]
        for name, speed in case["tokens_per_second"].items()
    ]
    return common.markdown(["precision", "engine", "tokens/s", "over bare DeepSpeed"], rows)


if __name__ == "__main__":
    main()
