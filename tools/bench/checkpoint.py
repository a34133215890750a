"""What a checkpoint costs: the wait of a training run, the disk's bandwidth, and a restart.

    python tools/bench/checkpoint.py [--rounds 4] [--out FILE]

- `stall`: `megafab.train.fit` on one rank saves every few steps, in turn asynchronously, in place, and by
  torch.distributed.checkpoint's own synchronous save of the same tensors. What the call takes is what
  training waits; `async_slowdown` is what the steps lose while the thread writes, on the same cores.
- `bandwidth`: `store.save` (hashed, synced, committed) and `store.load` of a state of many tensors, beside a
  plain write and fsync, and a plain read, of as many bytes. All write new files and sync them, on a disk
  that has nothing else to write, and all read from the page cache.
- `restart`: from the command to the first logged step, of a new run and of one that resumes.

The cases of a part take turns; the fastest round of each counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

ROOT = Path(__file__).resolve().parents[2]
MODEL = (
    "model=llama_tiny",
    *("model.layers=8", "model.hidden=512", "model.heads=8", "model.kv_heads=8", "model.ffn=1536"),
    *(f"model.vocab={common.VOCAB}", "model.seq_len=128", "train.global_batch=8", "train.micro_batch=4"),
    *("optim.lr=1e-4", "tracking=none", "eval.samples=0", "launch.threads=1"),
)
MODEL_TEXT = "8 layers of 512, vocabulary 4096, 8 sequences of 128 a step, fp32, 1 rank"
BETWEEN = 4  # steps between two saves
TENSORS, VALUES = 64, 1 << 20  # of the state for the bandwidth: 64 tensors of 4 MiB


def seconds(action: Callable[[], object]) -> float:
    """Wall seconds of a call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


class Saves:
    """Stands in for a run's checkpoints: saves in another way each time, and times it.

    Args:
        checkpoints: the run's own.
        engine: whose tensors torch saves.
        scratch: where torch saves them.
    """

    WAYS = ("async", "sync", "dcp")

    def __init__(self, checkpoints: Any, engine: Any, scratch: Path) -> None:
        self._checkpoints, self._engine, self._scratch = checkpoints, engine, scratch
        self.seconds: dict[str, list[float]] = {way: [] for way in self.WAYS}
        self.ways: dict[int, str] = {}

    def save(self, progress: Any, *, wait: bool) -> None:
        """One save; the way follows from the step."""
        way = self.WAYS[progress.step // BETWEEN % len(self.WAYS)]
        self.ways[progress.step] = way
        self._checkpoints._background.wait()
        calls = {
            "async": lambda: self._checkpoints.save(progress),
            "sync": lambda: self._checkpoints.save(progress, wait=True),
            "dcp": self._by_torch,
        }
        self.seconds[way].append(seconds(calls[way]))

    def _by_torch(self) -> None:
        from torch.distributed.checkpoint import save

        tensors = {
            f"{name}/{number}": piece.tensor.detach()
            for name, tensor in self._engine.sharded_state().items()
            for number, piece in enumerate(tensor.pieces)
        }
        shutil.rmtree(self._scratch, ignore_errors=True)
        save(tensors, checkpoint_id=self._scratch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoints, name)

    def __enter__(self) -> Any:
        return self._checkpoints.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._checkpoints.__exit__(*error)


def stall(rounds: int) -> dict[str, Any]:
    """Train and save, in this process."""
    from megafab.config import load
    from megafab.platform import platform

    platform.start(0, 1)
    from megafab.build import build
    from megafab.telemetry.rows import METRICS_FILE, read_rows
    from megafab.train import fit

    with tempfile.TemporaryDirectory() as scratch:
        corpus = common.random_corpus(Path(scratch) / "corpus")
        steps = (rounds + 1) * BETWEEN * len(Saves.WAYS)
        config = load.load(
            [
                *MODEL,
                f"train.steps={steps + BETWEEN - 1}",
                f"data.path={corpus.path}",
                f"run.dir={scratch}/run",
                f"checkpoint.every={BETWEEN}",
                "checkpoint.keep=1",
                "checkpoint.save_last=false",
            ]
        )
        run = build(config, ranks=1)
        saves = Saves(run.checkpoints, run.engine, Path(scratch) / "torch")
        fit(dataclasses.replace(run, checkpoints=saves))
        took = {row["step"]: row["step_seconds"] for row in read_rows(Path(scratch) / "run" / METRICS_FILE)}
        size = sum(piece.tensor.nbytes for t in run.engine.sharded_state().values() for piece in t.pieces)
    # The steps after a save and before the next one, summed; the first turn of each way warms up.
    after: dict[str, list[float]] = {way: [] for way in Saves.WAYS}
    for step, way in saves.ways.items():
        if step > BETWEEN * len(Saves.WAYS):
            after[way].append(sum(took[step + n] for n in range(1, BETWEEN)))
    quiet = min(after["sync"] + after["dcp"])
    return {
        "state_bytes": size,
        "step_seconds": round(min(took.values()), 3),
        **{f"{way}_seconds": round(min(times[1:]), 3) for way, times in saves.seconds.items()},
        "first_async_seconds": round(saves.seconds["async"][0], 3),
        "async_slowdown_seconds": round(max(0.0, min(after["async"]) - quiet), 3),
    }


def bandwidth(rounds: int) -> dict[str, Any]:
    """Save and load a state of tensors in this process, beside plain files."""
    import torch
    import torch.distributed.checkpoint as dcp

    from megafab.checkpoint import store
    from megafab.checkpoint.pieces import whole
    from megafab.platform import platform
    from megafab.topology.layout import Layout

    platform.start(0, 1)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    layout = Layout.whole((VALUES // 1024, 1024))
    values = torch.randn(TENSORS, VALUES)
    tensors = {f"weight/{n}": whole(values[n].view(-1, 1024), layout, owner=True) for n in range(TENSORS)}
    memory = memoryview(values.view(-1).numpy()).cast("B")
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        plain, ours, torchs = (Path(scratch) / name for name in ("plain", "ours", "torch"))

        named = {f"weight/{number}": row for number, row in enumerate(values)}

        def write() -> None:
            with open(plain, "wb", buffering=0) as file:
                done = 0
                while done < len(memory):
                    done += file.write(memory[done:])
                os.fsync(file.fileno())

        def read() -> None:
            with open(plain, "rb", buffering=0) as file:
                done = 0
                while done < len(memory):
                    done += file.readinto(memory[done:])

        path = store.path_of(ours, 1)
        cases: dict[str, Callable[[], object]] = {
            "write": write,
            "save": lambda: store.save(ours, 1, tensors, {}, keep=1),
            "dcp_save": lambda: dcp.save(named, checkpoint_id=torchs, no_dist=True),
            "read": read,
            "load": lambda: store.load(path, tensors),
            "dcp_load": lambda: dcp.load(named, checkpoint_id=torchs, no_dist=True),
            "verify": lambda: store.verify(path),
        }
        for _ in range(rounds + 1):
            plain.unlink(missing_ok=True)
            for directory in (ours, torchs):
                shutil.rmtree(directory, ignore_errors=True)
            for name, case in cases.items():
                os.sync()  # the disk has nothing left to write of the case before
                results.setdefault(name, []).append(seconds(case))
    speed = {name: len(memory) / min(times[1:]) / 1e9 for name, times in results.items()}
    return {
        "state_bytes": len(memory),
        "gigabytes_per_second": {name: round(value, 3) for name, value in speed.items()},
        "save_over_write": round(speed["save"] / speed["write"], 3),
        "load_over_read": round(speed["load"] / speed["read"], 3),
    }


def restart(rounds: int) -> dict[str, Any]:
    """A new run, ended by a signal, and the same command again; both until a step is logged."""
    times: dict[str, list[float]] = {"new_run": [], "resumed_run": []}
    with tempfile.TemporaryDirectory() as scratch:
        common.random_corpus(Path(scratch) / "corpus")
        for number in range(rounds):
            run_dir = Path(scratch) / f"run_{number}"
            command = [*MODEL, "train.steps=1000", f"data.path={scratch}/corpus", f"run.dir={run_dir}"]
            for name in times:
                times[name].append(first_step(command, run_dir))
    return {f"{name}_seconds": round(min(taken), 2) for name, taken in times.items()}


def first_step(command: list[str], run_dir: Path) -> float:
    """Seconds from the command to a new line of metrics.jsonl; the run is then told to save and leave."""
    metrics = run_dir / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    began = time.perf_counter()
    argv = [sys.executable, "-m", "launch.cli", "train", *command]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not (metrics.exists() and metrics.stat().st_size > before):
            assert process.poll() is None, "the run ended before a step"
            time.sleep(0.01)
        taken = time.perf_counter() - began
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 0
    return taken


PARTS = {"stall": stall, "bandwidth": bandwidth, "restart": restart}


def main() -> None:
    """Measure each part in a process of its own and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--part", choices=PARTS, help="only this one, to stdout")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "checkpoint.json")
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options.rounds)))
        return
    rounds = f"--rounds={options.rounds}"
    result = {
        "command": f"python tools/bench/checkpoint.py {rounds}",
        "model": MODEL_TEXT,
        "machine": common.facts(),
        **{part: common.run(__file__, rounds, f"--part={part}") for part in PARTS},
    }
    common.save(result, options.out)
    print(report(result))


def report(result: dict[str, Any]) -> str:
    """The numbers as a Markdown table."""
    stalled, disk, again = result["stall"], result["bandwidth"], result["restart"]
    speed = disk["gigabytes_per_second"]
    rows: list[list[object]] = [
        [f"a step ({stalled['state_bytes'] / 1e6:,.0f} MB of state)", "s", stalled["step_seconds"]],
        ["training waits for an asynchronous save", "s", stalled["async_seconds"]],
        ["the first one, which makes its buffers", "s", stalled["first_async_seconds"]],
        ["steps lose beside it, on the same core", "s", stalled["async_slowdown_seconds"]],
        ["training waits for a save in place", "s", stalled["sync_seconds"]],
        ["training waits for torch DCP's save", "s", stalled["dcp_seconds"]],
        [f"plain write and fsync ({disk['state_bytes'] / 1e6:,.0f} MB)", "GB/s", speed["write"]],
        ["save: hashed, synced, committed", "GB/s", speed["save"]],
        ["torch DCP's save", "GB/s", speed["dcp_save"]],
        ["save over plain write", "ratio", disk["save_over_write"]],
        ["plain read, from the page cache", "GB/s", speed["read"]],
        ["load", "GB/s", speed["load"]],
        ["torch DCP's load", "GB/s", speed["dcp_load"]],
        ["load over plain read", "ratio", disk["load_over_read"]],
        ["verify: every file hashed", "GB/s", speed["verify"]],
        ["from the command to the first step, new run", "s", again["new_run_seconds"]],
        ["the same, resumed", "s", again["resumed_run_seconds"]],
    ]
    return common.markdown(["", "unit", "measured"], rows)


if __name__ == "__main__":
    main()
