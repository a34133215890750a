"""What random layerwise token dropping saves: half of the tokens in the middle layers against all of them.

    python tools/bench/token_dropping.py [--threads 1] [--rounds 6] [--steps 2] [--out FILE]

One run of `megafab.train.fit` with the technique on; its blocks of `--steps` steps take turns: in one the
middle layers keep half of the tokens, in the next nothing is dropped, which is the plain model bit for bit.
Everything of a step counts, loader, optimizer and drawing included. The fastest block of each counts.
`wall` and `cpu` are the time of a dropping step over that of a whole one, `flops` the same of the FLOPs that
the run reports (`ModelShape.flops_per_token`, held to torch's count by tests/unit/test_token_dropping.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import common

# name: (what it is, overrides on top of llama_tiny)
CASES = {
    "tiny": (common.TINY_TEXT, ()),
    "deep": (
        "12 layers, hidden 256, sequence 512, vocabulary 4096, batch 4, micro-batch 2",
        (
            *("model.layers=12", "model.hidden=256", "model.heads=4", "model.kv_heads=4", "model.ffn=704"),
            *("model.seq_len=512", "train.global_batch=4", "train.micro_batch=2"),
        ),
    ),
}


class Turns:
    """Stands in for a run's `bus`: drops tokens in every other block only, and keeps time.

    Args:
        bus: the run's own.
        steps: of a block.
    """

    def __init__(self, bus: Any, steps: int) -> None:
        self._bus, self._steps = bus, steps
        self._began = common.clock()
        self.blocks: dict[str, list[common.Clock]] = {"dropping": [], "whole": []}
        self.flops: dict[str, float] = {}

    def schedule(self, plan: Any, progress: Any) -> Any:
        """The plan of the next step; at the first of a block, the last block's time."""
        names = tuple(self.blocks)
        block, inside = divmod(plan.step, self._steps)
        if inside == 0:
            now = common.clock()
            if block:
                self.blocks[names[(block - 1) % 2]].append(common.passed(self._began, now))
            self._began = now
        name = names[block % 2]
        plan = self._bus.schedule(plan, progress) if name == "dropping" else plan
        self.flops[name] = plan.flops
        return plan

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One model in this process."""
    from megafab.config import load
    from megafab.platform import platform

    platform.start(0, options.threads)
    from megafab.build import build
    from megafab.train import fit

    text, overrides = CASES[options.case]
    with tempfile.TemporaryDirectory() as scratch:
        corpus = common.random_corpus(Path(scratch) / "corpus")
        arguments = [
            *common.TINY,
            *overrides,
            # The last step's plan ends the last block.
            f"train.steps={2 * (options.rounds + 1) * options.steps + 1}",
            "technique=[token_dropping]",
            "techniques.token_dropping.steps=1e9",  # r stays where it starts
            f"data.path={corpus.path}",
            f"run.dir={scratch}/run",
            "tracking=none",
            "eval.samples=0",
            "eval.every=0",
        ]
        half = next(int(a.split("=")[1]) for a in reversed(arguments) if a.startswith("model.seq_len=")) // 2
        config = load.load([*arguments, f"techniques.token_dropping.start={half}"])
        run = build(config, ranks=1)
        turns = Turns(run.bus, options.steps)
        fit(dataclasses.replace(run, bus=turns))
    # The first block of each warms up allocator and caches.
    wall, cpu = (
        {name: min(block[i] for block in blocks[1:]) for name, blocks in turns.blocks.items()} for i in (0, 1)
    )
    return {
        "model": text,
        "layers_that_drop": f"{config.model.layers - 2} of {config.model.layers}",
        "kept": f"{half} of {config.model.seq_len}",
        "seconds_a_step": {name: round(seconds / options.steps, 4) for name, seconds in wall.items()},
        "flops": round(turns.flops["dropping"] / turns.flops["whole"], 4),
        "wall": round(wall["dropping"] / wall["whole"], 4),
        "cpu": round(cpu["dropping"] / cpu["whole"], 4),
    }


def main() -> None:
    """Measure each model in a process of its own and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6, help="blocks of each kind that count")
    parser.add_argument("--steps", type=int, default=2, help="steps of a block")
    parser.add_argument("--case", choices=CASES, help="only this one, to stdout")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "token_dropping.json")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options)))
        return
    arguments = [f"--{name}={getattr(options, name)}" for name in ("threads", "rounds", "steps")]
    result = {
        "command": f"python tools/bench/token_dropping.py {' '.join(arguments)}",
        "machine": common.facts(),
        "cases": [common.run(__file__, *arguments, f"--case={case}") for case in CASES],
    }
    common.save(result, options.out)
    print(report(result))


def report(result: dict[str, Any]) -> str:
    """The numbers as a Markdown table."""
    rows = [
        [case["model"], case["layers_that_drop"], case["kept"], case["flops"], case["wall"], case["cpu"]]
        for case in result["cases"]
    ]
    header = ["model", "layers that drop", "tokens kept", "FLOPs of a step", "its time", "its CPU time"]
    return common.markdown(header, rows)


if __name__ == "__main__":
    main()
