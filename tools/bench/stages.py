"""What trainings in stages reach beside single runs of the same model. Every number is of this size.

    python tools/bench/stages.py --corpora DIR [--steps 200] [--seeds 3] [--only PART ...] [--out FILE]

- `stacking`: `recipe=stacking` (2 layers for a third of the steps, then 8) beside 8 layers from scratch:
  tokens and FLOPs to the loss that the run from scratch ends with, the small model's counted.
- `sparse`: a dense model, `recipe=spdf` at three sparsities (four fifths sparse, the rest dense), 2:4, and
  `recipe=gradual_pruning`: loss, and theoretical FLOPs, which no mask saves on this machine.
- `infinite`: `recipe=infinite_lr` to the end of its anneal, beside a cosine over the same steps.
- `continual`: English, then German: with and without re-warming and replay, on the easiest fifth of the
  German text over and over, and both languages from the beginning in as many steps.

- `rewarming`: the same without replay, for several lengths of the warm-up and several peaks.

DIR has books.jsonl.gz (English) and german.jsonl.gz. Two runs at a time, one thread each. With `--only`, the
other parts of FILE stay.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common

from megafab.telemetry.comparison import reach
from megafab.telemetry.logged import LoggedRun, load_runs

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"english": "books", "german": "german"}
BYTES = 4_000_000  # of text of each language
SEQ_LEN, BATCH = 128, 8
COMMON = (
    *("model.hidden=128", "model.heads=4", f"model.seq_len={SEQ_LEN}"),
    *(
        f"train.global_batch={BATCH}",
        f"train.micro_batch={BATCH}",
        "train.log_every=10",
        "schedule.warmup=0.1",
    ),
    *("optim.lr=3e-3", "tracking=none", "eval.samples=32", "eval.every=10", "launch.threads=1"),
)
LLAMA = (*COMMON, "model.kv_heads=2", "model.ffn=384")
MODEL_TEXT = f"hidden 128, sequence {SEQ_LEN}, vocabulary 2048, {BATCH * SEQ_LEN} tokens a step, fp32"
LAYERS, SMALL = 8, 2
REPLAY = ("technique=[replay]", "techniques.replay.domains=[english]")
BOTH = "data.mixture={english: 1, german: 1}"


def build_corpora(corpora: Path, scratch: Path) -> None:
    """`english` and `both` below `scratch`, a twentieth held out; the latter with an index of difficulty."""
    sources = {}
    for name, file in SOURCES.items():
        path, left = scratch / f"{name}.jsonl", BYTES
        with gzip.open(corpora / f"{file}.jsonl.gz", "rt") as lines, path.open("w") as out:
            for line in lines:
                out.write(line)
                left -= len(line)
                if left < 0:
                    break
        sources[name] = f"{name}: {path}"
    for corpus, given in (("english", [sources["english"]]), ("both", sources.values())):
        settings = ("tokenizer.vocab=2048", "valid_fraction=0.05")
        megafab("data", f"out={scratch / corpus}", *settings, f"sources={{{', '.join(given)}}}")
    megafab("data", "difficulty", f"path={scratch / 'both'}", "metric=rarity", f"seq_len={SEQ_LEN}")


def megafab(*arguments: str) -> None:
    """The command, on one thread; its output only if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


class Trainings:
    """Runs of the bench, two at a time, each in a directory of its own that stays for later ones."""

    def __init__(self, scratch: Path, seeds: int) -> None:
        self._scratch, self.seeds = scratch, range(1, seeds + 1)

    def place(self, name: str, seed: int) -> Path:
        """The run directory of a case."""
        return self._scratch / "runs" / f"{name}-{seed}"

    def run(self, corpus: str, cases: Mapping[str, Callable[[int], Sequence[str]]]) -> None:
        """Train every case with every seed on one of the corpora."""

        def one(name: str, seed: int) -> None:
            place = (f"data.path={self._scratch / corpus}", f"run.dir={self.place(name, seed)}")
            megafab("train", *cases[name](seed), f"train.seed={seed}", *place)
            print(f"{name}, seed {seed}", file=sys.stderr, flush=True)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda pair: one(*pair), [(n, s) for s in self.seeds for n in cases]))

    def last(self, name: str, seed: int) -> list[LoggedRun]:
        """The run, or its stages in order."""
        return load_runs([self.place(name, seed)])


def mean(values: Sequence[float]) -> float:
    """Over seeds, to four digits."""
    return round(statistics.fmean(values), 4)


def loss_of(run: LoggedRun, domain: str = "english") -> float:
    """The last validation loss of a language."""
    return run.known(f"valid_domain_loss/{domain}")[-1]


def stacking(trainings: Trainings, steps: int) -> dict[str, Any]:
    """Tokens and FLOPs to the loss of the run from scratch."""
    trainings.run(
        "english",
        {
            "scratch": lambda seed: (
                *("model=llama_tiny", *LLAMA),
                *(f"model.layers={LAYERS}", f"train.steps={steps}"),
            ),
            "stacked": lambda seed: (
                *("recipe=stacking", *LLAMA, f"stages.small.model.layers={SMALL}"),
                *(f"stages.stacked.grow.layers={LAYERS}", f"stages.small.train.steps={steps // 3}"),
                f"stages.stacked.train.steps={steps}",
            ),
        },
    )
    rows = []
    for seed in trainings.seeds:
        (scratch,), (small, stacked) = trainings.last("scratch", seed), trainings.last("stacked", seed)
        goal = scratch.known("valid_loss")[-1]
        mine, theirs = reach(scratch, goal), reach(stacked, goal)
        assert mine is not None
        rows.append(
            {
                "seed": seed,
                "scratch_loss": goal,
                "small_loss": small.known("valid_loss")[-1],
                "stacked_loss": stacked.known("valid_loss")[-1],
                "scratch_tokens": mine.tokens,
                "scratch_flops": mine.flops,
                "stacked_tokens": theirs and theirs.tokens,
                "stacked_flops": theirs and theirs.flops,
                "speed_up": theirs and round(mine.flops / theirs.flops - 1, 4),
            }
        )
    return {"layers": [SMALL, LAYERS], "steps": [steps // 3, steps], "seeds": rows}


def sparse(trainings: Trainings, steps: int) -> list[dict[str, Any]]:
    """The loss of dense, sparse and pruned models in as many steps."""
    dense_steps = steps // 5
    base = ("model.layers=4", *LLAMA)
    ends = (f"stages.sparse.train.steps={steps - dense_steps}", f"stages.dense.train.steps={dense_steps}")
    static = "stages.sparse.techniques.static_sparsity"
    cases: dict[str, Callable[[int], Sequence[str]]] = {
        "dense": lambda seed: ("model=llama_tiny", *base, f"train.steps={steps}"),
        **{
            f"static {share:.0%}, then dense": lambda seed, share=share: (
                *("recipe=spdf", *base, *ends, f"{static}.sparsity={share}"),
            )
            for share in (0.5, 0.75, 0.9)
        },
        "2:4, then dense": lambda seed: (
            *("recipe=spdf", *base, *ends, f"{static}.pattern=two_four", f"{static}.sparsity=null"),
        ),
        **{
            f"pruned to {share:.0%}": lambda seed, share=share: (
                *("recipe=gradual_pruning", *base, f"train.steps={steps}"),
                f"techniques.gradual_pruning.sparsity={share}",
            )
            for share in (0.5, 0.75)
        },
    }
    trainings.run("english", cases)
    rows = []
    for name in cases:
        runs = [trainings.last(name, seed) for seed in trainings.seeds]
        theory = [key for key in runs[0][0].rows[-1] if key.endswith("/theoretical_speedup")]
        saved = mean([stages[0].known(theory[0])[-1] for stages in runs]) if theory else 1.0
        rows.append(
            {
                "case": name,
                "first": mean([stages[0].known("valid_loss")[-1] for stages in runs]),
                "last": mean([stages[-1].known("valid_loss")[-1] for stages in runs]),
                "losses": [round(stages[0].known("valid_loss")[-1], 4) for stages in runs],
                "theoretical_speedup": saved,
            }
        )
    return rows


def infinite(trainings: Trainings, steps: int) -> dict[str, Any]:
    """The infinite schedule's anneal beside a cosine."""
    base = ("model.layers=4", *LLAMA)
    anneal = steps // 5
    trainings.run(
        "english",
        {
            "cosine": lambda seed: ("model=llama_tiny", *base, f"train.steps={steps}"),
            "infinite": lambda seed: (
                *("recipe=infinite_lr", *(o for o in base if not o.startswith("schedule"))),
                *("stages.main.schedule.warmup=0.1", f"stages.main.train.steps={steps - anneal}"),
                f"stages.anneal.train.steps={anneal}",
                f"stages.onward.train.steps={anneal}",
            ),
        },
    )
    runs = [trainings.last("infinite", seed) for seed in trainings.seeds]
    return {
        "cosine": mean(
            [trainings.last("cosine", seed)[0].known("valid_loss")[-1] for seed in trainings.seeds]
        ),
        **{
            name: mean([stages[number].known("valid_loss")[-1] for stages in runs])
            for number, name in enumerate(("main", "anneal", "onward"))
        },
    }


def continual(trainings: Trainings, steps: int) -> dict[str, Any]:
    """English, then German."""
    base = ("model=llama_tiny", "model.layers=4", *LLAMA)
    plain = [override for override in base if not override.startswith("schedule")]
    low = ("optim.lr=3e-4", "schedule=constant", "schedule.warmup=0")
    trainings.run(
        "both", {"english": lambda seed: (*base, "data.mixture={english: 1}", f"train.steps={steps}")}
    )

    def begun(*overrides: str) -> Callable[[int], Sequence[str]]:
        return lambda seed: (
            *(*plain, f"start.checkpoint={trainings.place('english', seed)}", f"train.steps={steps}"),
            *overrides,
        )

    rewarmed = ("schedule=rewarm", "schedule.warmup=0.1")
    german = "data.mixture={german: 1}"
    easiest = (
        *(
            "technique=[replay,curriculum]",
            "techniques.replay.domains=[english]",
            "techniques.replay.share=0.25",
        ),
        *(f"techniques.curriculum.difficulty=rarity-{SEQ_LEN}", BOTH),
        "techniques.curriculum.pacing={shape: linear, start: 20, end: 20, steps: 1}",
    )
    cases = {
        "re-warmed": begun(*rewarmed, german),
        **{
            f"re-warmed, replay {share:.0%}": begun(
                *rewarmed, *REPLAY, BOTH, f"techniques.replay.share={share}"
            )
            for share in (0.05, 0.25, 0.5)
        },
        "not re-warmed": begun(*low, german),
        "not re-warmed, replay 25%": begun(*low, *REPLAY, BOTH, "techniques.replay.share=0.25"),
        "re-warmed, replay 25%, easiest fifth": begun(*rewarmed, *easiest),
        "union from scratch": lambda seed: (*base, BOTH, f"train.steps={2 * steps}"),
    }
    trainings.run("both", cases)
    before = [trainings.last("english", seed)[0] for seed in trainings.seeds]
    rows = []
    for name in cases:
        runs = [trainings.last(name, seed)[0] for seed in trainings.seeds]
        rows.append(
            {
                "case": name,
                "english": mean([loss_of(run) for run in runs]),
                "german": mean([loss_of(run, "german") for run in runs]),
                "worst_english": mean([max(run.known("valid_domain_loss/english")) for run in runs]),
            }
        )
    begun_with = {name: mean([loss_of(run, name) for run in before]) for name in SOURCES}
    return {"before": begun_with, "cases": rows}


def rewarming(trainings: Trainings, steps: int) -> list[dict[str, Any]]:
    """How long and how high the learning rate warms up again, as Gupta et al. 2023 sweep it."""
    base = ("model=llama_tiny", "model.layers=4", *LLAMA)
    plain = [o for o in base if not o.startswith(("schedule", "optim.lr"))]
    trainings.run(
        "both", {"english": lambda seed: (*base, "data.mixture={english: 1}", f"train.steps={steps}")}
    )
    sweep = [(share, 3e-3) for share in (0.005, 0.01, 0.02, 0.1)] + [(0.01, peak) for peak in (1.5e-3, 6e-3)]

    def again(share: float, peak: float) -> Callable[[int], Sequence[str]]:
        return lambda seed: (
            *(*plain, f"start.checkpoint={trainings.place('english', seed)}", f"train.steps={steps}"),
            *("schedule=rewarm", f"schedule.warmup={share}", f"optim.lr={peak}", "data.mixture={german: 1}"),
        )

    cases = {f"warm-up {share:.1%}, peak {peak:g}": again(share, peak) for share, peak in sweep}
    trainings.run("both", cases)
    return [
        {
            "case": name,
            **{
                language: mean([loss_of(trainings.last(name, seed)[0], language) for seed in trainings.seeds])
                for language in SOURCES
            },
        }
        for name in cases
    ]


def main() -> None:
    """Measure, write the JSON, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=common.RESULTS / "stages.json")
    options = parser.parse_args()
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    with tempfile.TemporaryDirectory() as directory:
        build_corpora(options.corpora, Path(directory))
        trainings = Trainings(Path(directory), options.seeds)
        for name in options.only:
            result[name] = {
                "command": f"python tools/bench/stages.py --corpora DIR --steps {options.steps} "
                f"--seeds {options.seeds} --only {name}",
                "model": MODEL_TEXT,
                "machine": common.facts(),
                "result": PARTS[name](trainings, options.steps),
            }
            common.save(result, options.out)
    print(report(result))


PARTS: dict[str, Callable[[Trainings, int], Any]] = {
    "stacking": stacking,
    "sparse": sparse,
    "infinite": infinite,
    "continual": continual,
    "rewarming": rewarming,
}


def report(result: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    return "\n\n".join(_tables(result))


def _tables(result: Mapping[str, Any]) -> Iterator[str]:
    for name, part in result.items():
        yield _TABLES[name](part["result"])


def _stacking_table(part: Mapping[str, Any]) -> str:
    def count(value: float | None) -> str:
        return "not reached" if value is None else f"{value:,.0f}" if value < 1e9 else f"{value:.3g}"

    header = ["seed", "loss from scratch", "stacked", "tokens", "stacked", "FLOPs", "stacked", "speed-up"]
    rows = [
        [
            *(str(row["seed"]), f"{row['scratch_loss']:.3f}", f"{row['stacked_loss']:.3f}"),
            *(count(row["scratch_tokens"]), count(row["stacked_tokens"])),
            *(count(row["scratch_flops"]), count(row["stacked_flops"])),
            "" if row["speed_up"] is None else f"{row['speed_up']:+.1%}",
        ]
        for row in part["seeds"]
    ]
    return common.markdown(header, rows)


def _sparse_table(part: Sequence[Mapping[str, Any]]) -> str:
    header = ["sparsity", "first stage", "at the end", "theoretical FLOPs, first stage"]
    rows = [
        [row["case"], f"{row['first']:.3f}", f"{row['last']:.3f}", f"1 / {row['theoretical_speedup']:.2f}"]
        for row in part
    ]
    return common.markdown(header, rows)


def _infinite_table(part: Mapping[str, float]) -> str:
    return common.markdown(["schedule", "loss"], [[name, f"{loss:.3f}"] for name, loss in part.items()])


def _continual_table(part: Mapping[str, Any]) -> str:
    before = part["before"]
    rows = [["before", f"{before['english']:.3f}", "", f"{before['german']:.3f}"]]
    rows += [
        [row["case"], *(f"{row[key]:.3f}" for key in ("english", "worst_english", "german"))]
        for row in part["cases"]
    ]
    return common.markdown(["English, then German", "English", "at worst", "German"], rows)


def _rewarming_table(part: Sequence[Mapping[str, Any]]) -> str:
    rows = [[row["case"], *(f"{row[key]:.3f}" for key in ("english", "german"))] for row in part]
    return common.markdown(["English, then German, re-warmed", "English", "German"], rows)


_TABLES: dict[str, Callable[[Any], str]] = {
    "stacking": _stacking_table,
    "sparse": _sparse_table,
    "infinite": _infinite_table,
    "continual": _continual_table,
    "rewarming": _rewarming_table,
}


if __name__ == "__main__":
    main()
