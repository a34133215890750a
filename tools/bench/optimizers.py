"""What an update of each optimizer costs, and how far each trains the same model in the same steps.

    python tools/bench/optimizers.py [--steps 100] [--lr 1e-3 3e-3 1e-2 3e-2] [--threads 1] [--out FILE]

A small Llama on code, tests and prose of the standard library, one rank, fp32, cosine schedule; each
optimizer at each learning rate (Lion at a tenth of it, with three times the decay), one after the other in
one process. Losses are of the validation split at the last step; the best learning rate counts. The cost of
an update is its CPU time with clipping, and that of forward and backward is beside it: the mean of ten steps,
which is SOAP's period, in the fastest ten, of all learning rates.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

OPTIMIZERS = ("adamw", "lion", "muon", "soap")
PERIOD = 10  # steps, of which one is SOAP's power iteration
MODEL = (
    *("model=llama_tiny", "model.layers=2", "model.hidden=128", "model.heads=4", "model.kv_heads=2"),
    *("model.ffn=384", "model.seq_len=128", "train.global_batch=8", "train.micro_batch=8"),
)


class Timed:
    """Stands in for a run's engine and notes the CPU seconds of its calls.

    Args:
        engine: the run's own.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.seconds: dict[str, list[float]] = {"forward_backward": [], "update": []}

    def forward_backward(self, *arguments: Any) -> Any:
        """The engine's."""
        return self._timed("forward_backward", *arguments)

    def update(self, *arguments: Any) -> Any:
        """The engine's."""
        return self._timed("update", *arguments)

    def _timed(self, name: str, *arguments: Any) -> Any:
        began = time.process_time()
        result = getattr(self._engine, name)(*arguments)
        self.seconds[name].append(time.process_time() - began)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def fastest(self, name: str) -> float:
        """Mean seconds of a call in the fastest period, the first left out."""
        seconds = self.seconds[name]
        periods = range(PERIOD, len(seconds) - PERIOD + 1, PERIOD)
        return min(sum(seconds[start : start + PERIOD]) for start in periods) / PERIOD


def measure(overrides: Sequence[str], run_dir: str) -> dict[str, float]:
    """Train once: the last validation loss, and the seconds of update and of forward and backward."""
    from megatron.core import parallel_state

    from megafab.build import build
    from megafab.config import load
    from megafab.telemetry.rows import METRICS_FILE, read_rows
    from megafab.train import fit

    parallel_state.destroy_model_parallel()  # of the run before
    run = build(load.load([*overrides, f"run.dir={run_dir}"]), ranks=1, message=lambda text: None)
    engine = Timed(run.engine)
    fit(dataclasses.replace(run, engine=engine))
    last = read_rows(Path(run_dir) / METRICS_FILE)[-1]
    return {
        "valid_loss": round(last["valid_loss"], 4),
        "update_ms": round(1000 * engine.fastest("update"), 2),
        "forward_backward_ms": round(1000 * engine.fastest("forward_backward"), 2),
    }


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "optimizers.json")
    options = parser.parse_args()

    from data_pipeline.build import build as build_corpus
    from data_pipeline.config import BuildConfig
    from megafab.config import load
    from megafab.platform import platform

    platform.start(0, options.threads)
    cases = []
    with tempfile.TemporaryDirectory() as scratch:
        corpus = f"{scratch}/corpus"
        arguments = ["stdlib_bytes=1000000", "tokenizer.vocab=2048", "valid_fraction=0.05", "workers=1"]
        build_corpus(load.compose(BuildConfig, "data", [f"out={corpus}", *arguments]))
        for name in OPTIMIZERS:
            for given in options.lr:
                lr = float(f"{given / 10:g}") if name == "lion" else given
                decay = 0.3 if name == "lion" else 0.1
                found = measure(
                    [
                        *(
                            *MODEL,
                            f"optim.lr={lr}",
                            f"optim={name}",
                            f"optim.weight_decay={decay}",
                            f"data.path={corpus}",
                        ),
                        *(f"train.steps={options.steps}", "schedule.warmup=0.1", "tracking=none"),
                        *("eval.samples=32", "checkpoint.save_last=false"),
                    ],
                    f"{scratch}/{name}-{lr:g}",
                )
                cases.append({"optimizer": name, "lr": lr, **found})
                print(json.dumps(cases[-1]), flush=True)
    rates = " ".join(f"{lr:g}" for lr in options.lr)
    result = {
        "command": f"python tools/bench/optimizers.py --steps {options.steps} --lr {rates}",
        "model": "2 layers, hidden 128, sequence 128, vocabulary 2048, batch 8: 1024 tokens a step",
        "steps": options.steps,
        "machine": common.facts(),
        "cases": cases,
    }
    common.save(result, options.out)
    print(report(result))


def report(result: dict[str, Any]) -> str:
    """The numbers as a Markdown table, each optimizer at its best learning rate."""
    least = {
        name: min(case["update_ms"] for case in result["cases"] if case["optimizer"] == name)
        for name in OPTIMIZERS
    }
    rows = []
    for name in OPTIMIZERS:
        best = min(
            (case for case in result["cases"] if case["optimizer"] == name), key=lambda c: c["valid_loss"]
        )
        cost = least[name] / least["adamw"]
        rows.append([name, f"{best['lr']:g}", best["valid_loss"], least[name], cost])
    header = ["optimizer", "best lr", f"loss after {result['steps']} steps", "update, CPU ms", "of AdamW's"]
    return common.markdown(header, rows)


if __name__ == "__main__":
    main()
