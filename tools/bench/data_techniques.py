"""What the data techniques do to the loss of a small model, and what they cost. Every number is of this size.

    python tools/bench/data_techniques.py [--corpora DIR] [--steps 200] [--seeds 3] [--out FILE]

- `loss`: a small Llama trained the same number of steps on four domains, once a technique and seed. The mean
  over domains of the last validation losses counts, and the steps until the mean is what the static mixture
  ends with. Two runs at a time, one thread each.
- `noise`: the same with two more domains, random letters and one page over and over: what share of the
  mixture they end up with, and the loss of the four others.
- `cost`: what a technique adds to the CPU time of a step in the loader and in its hooks, as a share of the
  bare run's step, in turns in one process; the median step of the fastest turn.

With `--corpora`, the domains are books, math, news and wiki of a directory with `NAME.jsonl.gz`; without,
code, tests, prose and the documentation strings of the standard library.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import itertools
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = ("books", "math", "news", "wiki")
SEQ_LEN, BATCH = 128, 16
MODEL = (
    *("model=llama_tiny", "model.layers=4", "model.hidden=128", "model.heads=4", "model.kv_heads=2"),
    *("model.ffn=384", f"model.seq_len={SEQ_LEN}"),
    *(f"train.global_batch={BATCH}", f"train.micro_batch={BATCH}"),
    *("optim.lr=3e-3", "schedule.warmup=0.1", "tracking=none", "eval.samples=16"),
)
MODEL_TEXT = (
    f"4 layers, hidden 128, sequence {SEQ_LEN}, vocabulary 2048, {BATCH * SEQ_LEN} tokens a step, fp32"
)
BYTES = 1_500_000  # of text of each domain
TURNS, TURN_STEPS = 3, 24  # of a cost


def cases(steps: int, reference: Mapping[str, float]) -> dict[str, tuple[str, ...]]:
    """The overrides of every case; `reference` are losses by domain for those that want them."""
    losses = "{" + ", ".join(f"{name}: {loss:.4f}" for name, loss in reference.items()) + "}"
    half = steps // 2
    mixing, warmup = "techniques.online_mixing", f"warmup_steps={steps // 10}"
    return {
        "static, by tokens": (),
        "static, temperature 0.5": ("data.temperature=0.5",),
        "online_mixing, released": ("technique=[online_mixing]", f"{mixing}.{warmup}"),
        "online_mixing, paper": ("technique=[online_mixing]", f"{mixing}.{warmup}", f"{mixing}.mode=paper"),
        "online_mixing, excess": (
            *("technique=[online_mixing]", f"{mixing}.{warmup}", f"{mixing}.reward=excess"),
            f"{mixing}.reference={losses}",
        ),
        "online_mixing, decrease": (
            *("technique=[online_mixing]", f"{mixing}.{warmup}", f"{mixing}.reward=decrease"),
        ),
        "dynamic_loading": ("technique=[dynamic_loading]", f"techniques.dynamic_loading.reference={losses}"),
        "sample_reweighting": (
            *("technique=[sample_reweighting]", f"techniques.sample_reweighting.{warmup}"),
            "techniques.sample_reweighting.temperature=0.4",
        ),
        "token_selection": (
            *("technique=[token_selection]", f"techniques.token_selection.{warmup}"),
            "techniques.token_selection.reference=reference",
        ),
        "curriculum, rarity": (
            *("technique=[curriculum]", f"techniques.curriculum.difficulty=rarity-{SEQ_LEN}"),
            f"techniques.curriculum.pacing={{shape: root, degree: 2, start: 10, end: 100, steps: {half}}}",
        ),
        "sequence_curriculum, truncate": (
            "technique=[sequence_curriculum]",
            f"techniques.sequence_curriculum.pacing={{start: 32, end: 128, steps: {half}, round_to: 8}}",
        ),
        "token_dropping": (
            *("technique=[token_dropping]", "techniques.token_dropping.start=32"),
            f"techniques.token_dropping.steps={steps * 3 // 4}",
        ),
    }


COSTS = {
    "replay": ("technique=[replay]", "techniques.replay.domains=[{first}]"),
    "online_mixing": ("technique=[online_mixing]", "techniques.online_mixing.warmup_steps=0"),
    "sample_reweighting": ("technique=[sample_reweighting]", "techniques.sample_reweighting.warmup_steps=0"),
    "token_selection": ("technique=[token_selection]", "techniques.token_selection.reference=reference"),
    "curriculum": (
        *("technique=[curriculum]", f"techniques.curriculum.difficulty=rarity-{SEQ_LEN}"),
        "techniques.curriculum.pacing={{start: 10, end: 100, steps: 1000}}",
    ),
}


# -- corpora -------------------------------------------------------------------------------------------------


def write_sources(corpora: Path, out: Path) -> dict[str, str]:
    """The first bytes of each domain as JSONL."""
    sources = {}
    for name in DOMAINS:
        path, left = out / f"{name}.jsonl", BYTES
        with gzip.open(corpora / f"{name}.jsonl.gz", "rt") as lines, open(path, "w") as file:
            for line in lines:
                file.write(line)
                left -= len(line)
                if left < 0:
                    break
        sources[name] = str(path)
    return sources


def write_noise(out: Path) -> dict[str, str]:
    """A domain of random letters, and one of one page over and over."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz ,.;:!?0123456789"
    noise = ("".join(rng.choices(letters, k=2000)) for _ in range(BYTES // 4 // 2000))
    page = "".join(rng.choices(letters, k=1500))
    pages = (f"{number} " + page * 4 for number in range(BYTES // 4 // 6000))
    paths = {}
    for name, texts in (("noise", noise), ("page", pages)):
        path = out / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        paths[name] = str(path)
    return paths


def build_corpus(out: Path, sources: Mapping[str, str] | None) -> None:
    """A corpus with a twentieth held out."""
    from launch import data

    arguments = [f"out={out}", "tokenizer.vocab=2048", "valid_fraction=0.05", f"stdlib_bytes={BYTES}"]
    if sources is not None:
        arguments.append("sources={" + ", ".join(f"{name}: {path}" for name, path in sources.items()) + "}")
    assert data.main(arguments) == 0


# -- one run -------------------------------------------------------------------------------------------------


def train(overrides: Sequence[str], run_dir: Path) -> list[dict[str, Any]]:
    """Train in this process; the rows."""
    from megatron.core import parallel_state

    from megafab.build import build
    from megafab.config import load
    from megafab.telemetry.rows import METRICS_FILE, read_rows
    from megafab.train import fit

    parallel_state.destroy_model_parallel()  # of the run before
    fit(build(load.load([*MODEL, *overrides, f"run.dir={run_dir}"]), ranks=1, message=lambda text: None))
    return read_rows(run_dir / METRICS_FILE)


def run_case(overrides: Sequence[str], run_dir: Path, real: Sequence[str]) -> dict[str, Any]:
    """The curve of the mean validation loss of the `real` domains, and what the run took."""
    rows = train(overrides, run_dir)
    curve = [
        [row["step"], statistics.fmean(row["valid_domain_loss"][name] for name in real)]
        for row in rows
        if "valid_loss" in row
    ]
    return {
        "curve": curve,
        "loss": curve[-1][1],
        "domains": rows[-1]["valid_domain_loss"],
        "weights": rows[-1]["domain_weight"],
        "seconds": sum(row["step_seconds"] for row in rows),
        "tokens": rows[-1]["tokens"],
        "layer_tokens": rows[-1]["layer_tokens"],
        "flops": rows[-1]["flops"],
    }


def steps_to(curve: Sequence[Sequence[float]], loss: float) -> float:
    """Where the curve first reaches `loss`, between its points on a line; nan if it does not."""
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= loss:
            return before if high <= loss else before + (high - loss) / (high - low) * (after - before)
    return math.nan


def cost(corpus: Path, scratch: Path, first: str) -> dict[str, float]:
    """What each technique adds to a step, as a share of the bare run's: CPU time of the loop's thread."""
    wanted = {name: [override.format(first=first) for override in more] for name, more in COSTS.items()}
    run = [f"data.path={corpus}", f"train.steps={TURN_STEPS}", "eval.samples=0", "checkpoint.save_last=false"]
    found: dict[str, list[tuple[float, float]]] = {}
    for turn in range(TURNS):
        for name, overrides in {"bare": [], **wanted}.items():
            parts = _time_parts([*run, "data.prefetch=false", *overrides], scratch / f"cost-{turn}-{name}")
            found.setdefault(name, []).append(parts)
    part = {name: min(part for part, _ in turns) for name, turns in found.items()}
    step = min(step for _, step in found["bare"])
    return {name: round((part[name] - part["bare"]) / step, 5) for name in wanted}


class _Timed:
    """Stands in for a part of a run and adds up the CPU time of some of its calls."""

    def __init__(self, part: Any, names: Sequence[str]) -> None:
        self._part, self._names = part, names
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._part, name)
        if name not in self._names:
            return found

        def call(*arguments: Any) -> Any:
            began = time.thread_time()
            try:
                return found(*arguments)
            finally:
                self.seconds += time.thread_time() - began

        return call


def _time_parts(overrides: Sequence[str], run_dir: Path) -> tuple[float, float]:
    """Median seconds of a step in the loader and in the hooks of techniques, and in all of it."""
    from megatron.core import parallel_state

    from megafab.build import build
    from megafab.config import load
    from megafab.train import fit

    stamps: list[tuple[float, float]] = []  # in the parts, in all, at the beginning of each step

    class Stamped:
        def __init__(self, schedules: Any) -> None:
            self._schedules = schedules

        def at(self, progress: Any) -> Any:
            stamps.append((bus.seconds + loader.seconds, time.thread_time()))
            return self._schedules.at(progress)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._schedules, name)

    parallel_state.destroy_model_parallel()
    run = build(load.load([*MODEL, *overrides, f"run.dir={run_dir}"]), ranks=1, message=lambda text: None)
    bus = _Timed(run.bus, ("schedule", "batch", "loss", "gradients", "step", "metrics"))
    loader = _Timed(run.loader, ("take", "limit"))
    fit(dataclasses.replace(run, bus=bus, loader=loader, schedules=Stamped(run.schedules)))
    steps = list(itertools.pairwise(stamps[4:]))
    part = statistics.median(after[0] - before[0] for before, after in steps)
    return part, statistics.median(after[1] - before[1] for before, after in steps)


# -- the whole -----------------------------------------------------------------------------------------------


def child(arguments: Sequence[str]) -> None:
    """One case or the costs, in a process of its own: JSON on the last line."""
    kind, corpus, scratch, *rest = arguments
    sys.path.insert(0, str(ROOT))
    from megafab.platform import platform

    platform.start(0, 1)
    if kind == "cost":
        print(json.dumps(cost(Path(corpus), Path(scratch), rest[0])))
        return
    run_dir, real, *overrides = rest
    print(json.dumps(run_case([*overrides, f"data.path={corpus}"], Path(run_dir), real.split(","))))


def compare(
    corpus: Path, scratch: Path, steps: int, seeds: int, *, only: Sequence[str] = (), prefix: str = ""
) -> dict[str, list[dict[str, Any]]]:
    """Every case with every seed; the static mixture first, whose losses are the others' references."""
    from megafab.data.format import Corpus

    real = [name for name in Corpus.open(corpus).domains if name not in ("noise", "page")]

    def one(name: str, overrides: Sequence[str], seed: int) -> dict[str, Any]:
        run_dir = scratch / f"{prefix}{name}-{seed}".replace(" ", "_").replace(",", "")
        more = (f"train.seed={seed}", f"train.steps={steps}", f"eval.every={max(1, steps // 10)}")
        where = str(corpus), str(scratch), str(run_dir), ",".join(real)
        found = common.run(__file__, "--child", "case", *where, *more, *overrides)
        print(f"{prefix}{name}, seed {seed}: {found['loss']:.4f}", file=sys.stderr, flush=True)
        return found

    first = one("reference", (), 0)
    if not only:  # else no case reads what is made here
        _prepare(corpus, scratch / f"{prefix}reference-0".replace(" ", "_"))
    wanted = {n: o for n, o in cases(steps, first["domains"]).items() if not only or n in only}
    pairs = [(name, seed) for seed in range(1, seeds + 1) for name in wanted]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda pair: one(pair[0], wanted[pair[0]], pair[1]), pairs))
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted}
    for (name, _), result in zip(pairs, found, strict=True):
        results[name].append(result)
    return results


def _prepare(corpus: Path, reference: Path) -> None:
    """What techniques read beside the corpus: a reference's losses, and difficulties."""
    from launch import cli

    assert cli.main(["score", f"checkpoint={reference}", "name=reference", "workers=2"]) == 0
    assert cli.main(["data", "difficulty", f"path={corpus}", "metric=rarity", f"seq_len={SEQ_LEN}"]) == 0


def summary(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    """One row a case: means over seeds, and the spread of the losses."""
    static = results["static, by tokens"]
    for name, runs in results.items():
        losses = [run["loss"] for run in runs]
        reached = [steps_to(run["curve"], base["loss"]) for run, base in zip(runs, static, strict=True)]
        yield {
            "case": name,
            "loss": round(statistics.fmean(losses), 4),
            "lowest": round(min(losses), 4),
            "highest": round(max(losses), 4),
            "against_static": round(
                statistics.fmean(run["loss"] - base["loss"] for run, base in zip(runs, static, strict=True)),
                4,
            ),
            "steps_to_static_loss": [None if math.isnan(steps) else round(steps) for steps in reached],
            "flops": statistics.fmean(run["flops"] for run in runs),
            "weights": {
                domain: round(statistics.fmean(run["weights"][domain] for run in runs), 3)
                for domain in runs[0]["weights"]
            },
        }


def main() -> None:
    """Measure, write the JSON, print the tables."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--corpora", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "data_techniques.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        sources = write_sources(options.corpora, scratch) if options.corpora else None
        build_corpus(scratch / "corpus", sources)
        loss = compare(scratch / "corpus", scratch, options.steps, options.seeds)
        domains = list(loss["static, by tokens"][0]["weights"])
        costs = common.run(__file__, "--child", "cost", str(scratch / "corpus"), str(scratch), domains[0])
        noise = {}
        if sources is not None:
            build_corpus(scratch / "noisy", {**sources, **write_noise(scratch)})
            names = cases(options.steps, {})
            mixing = [name for name in names if name.startswith(("static, by", "online", "dynamic"))]
            noise = compare(scratch / "noisy", scratch, options.steps, 1, only=mixing, prefix="noisy ")
    result = {
        "command": f"python tools/bench/data_techniques.py --steps {options.steps} --seeds {options.seeds}"
        + (" --corpora DIR" if options.corpora else ""),
        "model": MODEL_TEXT,
        "domains": domains,
        "machine": common.facts(),
        "loss": list(summary(loss)),
        "noise": list(summary(noise)) if noise else [],
        "cost": costs,
    }
    common.save(result, options.out)
    print(report(result))


def report(result: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    header = ["technique", "mean loss", "lowest to highest", "against static", "steps to static's loss"]

    def reached(steps: Sequence[int | None]) -> str:
        return ", ".join("not reached" if count is None else str(count) for count in steps)

    rows = [
        [
            *(row["case"], f"{row['loss']:.3f}", f"{row['lowest']:.3f} to {row['highest']:.3f}"),
            *(f"{row['against_static']:+.3f}", reached(row["steps_to_static_loss"])),
        ]
        for row in result["loss"]
    ]
    tables = [common.markdown(header, rows)]
    if result["noise"]:
        rows = [
            [
                row["case"],
                *(f"{x:.3f}" for x in (row["loss"], row["weights"]["noise"], row["weights"]["page"])),
            ]
            for row in result["noise"]
        ]
        tables.append(common.markdown(["with noise", "loss of the others", "noise", "one page"], rows))
    rows = [[name, f"{100 * share:.2f}%"] for name, share in result["cost"].items()]
    tables.append(common.markdown(["technique", "adds to the CPU time of a step"], rows))
    return "\n\n".join(tables)


if __name__ == "__main__":
    main()
