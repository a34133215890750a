"""How long a user waits: help, a checked configuration, and from the command to the first logged step.

    python tools/bench/startup.py [--rounds 3] [--out FILE]

- `help`: `megafab --help`; `config`: `megafab train recipe=quickstart --cfg job`, rules included.
- `first_step`: `megafab train recipe=quickstart` (4 ranks, a small corpus already built) until the first
  line stands in metrics.jsonl; wandb is offline.
- `phases`: the same on one rank in one process, phase by phase; four ranks on two cores share them.

The fastest round counts.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

MEGAFAB = (sys.executable, "-m", "launch.cli")
QUICKSTART = ("train", "recipe=quickstart", "tracking.mode=offline")
GIVE_UP = 300.0  # seconds


def seconds_of(*command: str, cwd: Path) -> float:
    """Wall seconds of a command that succeeds."""
    began = time.perf_counter()
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def first_step(cwd: Path, run_dir: Path) -> float:
    """Seconds from the command to the first line of metrics.jsonl; the run is then told to stop."""
    command = [*MEGAFAB, *QUICKSTART, f"run.dir={run_dir}"]
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL) as process:
        metrics = run_dir / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None, "the run ended before its first step"
            assert time.perf_counter() - began < GIVE_UP, "no step was logged"
            time.sleep(0.01)
        taken = time.perf_counter() - began
        process.send_signal(signal.SIGTERM)
    return taken


def phases() -> dict[str, float]:
    """Where the start of one rank goes; runs in a process of its own, in the directory of the corpus."""
    now = time.perf_counter
    marks = [("start", now())]
    from megafab.config import load, rules

    config = load.load(
        [
            *QUICKSTART[1:],
            "parallel.tensor=1",
            "parallel.pipeline=1",
            "launch.ranks=1",
            "run.dir=phases",
            "train.steps=1",
            "schedule.warmup=0",
            "eval.samples=0",
            "eval.every=0",
            "checkpoint.save_last=false",
        ]
    )
    rules.check_all(config, ranks=1, corpus=rules.corpus_facts(config))
    marks.append(("configuration and rules", now()))
    import torch  # noqa: F401

    marks.append(("import torch", now()))
    from megafab.platform import platform

    platform.start(0, 1)
    marks.append(("import and prepare Megatron-core", now()))
    from megafab.build import build
    from megafab.train import fit

    marks.append(("import the rest of megafab", now()))
    run = build(config, ranks=1)
    marks.append(("build model, optimizer, loader", now()))
    fit(run)
    marks.append(("wandb, first step, shutdown", now()))
    return {name: end - begin for (_, begin), (name, end) in zip(marks, marks[1:], strict=False)}


def main() -> None:
    """Measure everything `--rounds` times and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "startup.json")
    parser.add_argument("--phases", action="store_true", help="these only, here, to stdout")
    options = parser.parse_args()
    if options.phases:
        print(json.dumps(phases()))
        return
    samples: dict[str, list[float]] = {}
    phase_samples: list[dict[str, float]] = []
    root = Path(__file__).resolve().parents[2]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as scratch:
        cwd = Path(scratch)
        common.random_corpus(cwd / "runs/data/python_stdlib")
        for number in range(options.rounds):
            for name, taken in {
                "help": seconds_of(*MEGAFAB, "--help", cwd=cwd),
                "config": seconds_of(*MEGAFAB, *QUICKSTART, "--cfg", "job", cwd=cwd),
                "first_step": first_step(cwd, cwd / f"runs/{number}"),
            }.items():
                samples.setdefault(name, []).append(taken)
            os.chdir(cwd)
            phase_samples.append(common.run(__file__, "--phases"))
            os.chdir(root)
    result = {
        "command": f"python tools/bench/startup.py --rounds={options.rounds}",
        "machine": common.facts(),
        "seconds": {name: round(min(times), 2) for name, times in samples.items()},
        "by_round": {name: [round(t, 2) for t in times] for name, times in samples.items()},
        "phases": {name: round(min(p[name] for p in phase_samples), 2) for name in phase_samples[0]},
    }
    common.save(result, options.out)
    print(report(result))


def report(result: dict[str, Any]) -> str:
    """The numbers as a Markdown table."""
    seconds = result["seconds"]
    rows: list[list[object]] = [
        ["`megafab --help`", seconds["help"]],
        ["`megafab train recipe=quickstart --cfg job`", seconds["config"]],
        ["`megafab train recipe=quickstart` to its first logged step, 4 ranks", seconds["first_step"]],
        *([f"one rank: {name}", taken] for name, taken in result["phases"].items()),
    ]
    return common.markdown(["from the command to", "seconds"], rows)


if __name__ == "__main__":
    main()
