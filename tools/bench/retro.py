"""What looking at neighbours costs a model, and what it is worth on real text.

    OMP_NUM_THREADS=1 python tools/bench/retro.py [--corpora DIR] [--steps 300] [--rounds 3]
        [--only PART] [--out FILE]

- `cost`: tokens a second of a model with retrieval over those of the same model without, at equal depth, and
  the same of the FLOPs that both report. Runs take turns; the fastest step of each counts.
- `worth`: the same model trained with and without retrieval in the same steps, then evaluated with its
  neighbours, with wrong ones and with none (`megafab perplexity`), on documents that are not in the database.

DIR has books.jsonl.gz and wiki.jsonl.gz; without it the corpus is the standard library's source. With
`--only`, the rest of FILE stays.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

CHUNK = 16
# name: (what it is, overrides on top of llama_tiny)
CASES = {
    "llama_tiny": ("chunks of 16, two neighbours of 32 tokens, an encoder of 2 layers", ()),
    "one encoder layer": (
        "chunks of 16, one neighbour of 32 tokens, an encoder of 1 layer",
        ("model.retro.neighbors=1", "model.retro.encoder_layers=1"),
    ),
}
RETRO = (f"model.retro.chunk={CHUNK}", f"data.retrieval=tfidf-{CHUNK}")
SHORT = ("train.steps=8", "eval.samples=0", "checkpoint.save_last=false")
WORTH = (
    *("model=llama_tiny", "model.hidden=128", "model.heads=4", "model.kv_heads=2", "model.ffn=384"),
    *("model.seq_len=128", "train.global_batch=16", "train.micro_batch=16", "optim.lr=1e-3"),
    *("schedule.warmup=0.1", "eval.samples=64", "train.log_every=10"),
)
MODES, HEADS = ("on", "wrong", "off"), ("neighbours", "wrong ones", "none")


def megafab(*arguments: str) -> None:
    """One command; its output is of no interest unless it fails."""
    command = [sys.executable, "-m", "launch.cli", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}")


def build(corpora: Path | None, corpus: Path) -> None:
    """The corpus and the neighbours of its chunks; a twentieth of the documents is in no database."""
    sources = ["stdlib_bytes=3000000"]
    if corpora is not None:
        books, wiki = (corpora / f"{name}.jsonl.gz" for name in ("books", "wiki"))
        sources = [f"sources={{books: {books}, wiki: {wiki}}}"]
    megafab("data", f"out={corpus}", "tokenizer.vocab=4096", "valid_fraction=0.05", *sources)
    megafab("data", "retrieval", f"path={corpus}", f"chunk={CHUNK}", "index=IVF1024,Flat", "nprobe=16")


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The logged steps of a run."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def cost(corpus: Path, scratch: Path, rounds: int) -> dict[str, Any]:
    """By case, what retrieval costs."""
    found = {}
    for name, (text, overrides) in CASES.items():
        fastest, flops = {"plain": 0.0, "retro": 0.0}, {"plain": 0.0, "retro": 0.0}
        for turn in range(rounds):
            for kind, more in (("plain", ()), ("retro", (*RETRO, *overrides))):
                run_dir = scratch / f"{name.replace(' ', '-')}-{kind}-{turn}"
                where = (f"data.path={corpus}", f"run.dir={run_dir}", "tracking=none", "launch.threads=1")
                megafab("train", *common.TINY, *SHORT, *where, *more)
                steps = rows(run_dir)
                fastest[kind] = max(fastest[kind], *(row["tokens_per_second"] for row in steps[2:]))
                flops[kind] = steps[-1]["total_flops"] / steps[-1]["total_tokens"]
        found[name] = {
            "is": f"{common.TINY_TEXT}; {text}",
            "tokens_per_second": fastest,
            "speed": fastest["retro"] / fastest["plain"],
            "flops": flops["retro"] / flops["plain"],
        }
    return found


def worth(corpus: Path, scratch: Path, steps: int) -> dict[str, Any]:
    """Losses with neighbours, with wrong ones, with none, and of the model without retrieval."""
    found: dict[str, Any] = {"steps": steps, "model": " ".join(WORTH)}
    for kind, more in (("plain", ()), ("retro", RETRO)):
        run_dir = scratch / f"worth-{kind}"
        where = (f"data.path={corpus}", f"run.dir={run_dir}", "tracking=none")
        megafab("train", *WORTH, f"train.steps={steps}", *where, *more)
        megafab("perplexity", f"checkpoint={run_dir}", "samples=256", "micro_batch=16")
        found[kind] = json.loads((run_dir / "perplexity.json").read_text())["domains"]
    return found


def table(result: dict[str, Any]) -> str:
    """Both parts in Markdown."""
    lines = [
        [name, case["is"], case["speed"], case["flops"]] for name, case in result.get("cost", {}).items()
    ]
    parts = [common.markdown(["case", "what", "tokens/s over plain", "FLOPs over plain"], lines)]
    for text, found in result.get("worth", {}).items():
        plain = {name: domain["loss"]["off"] for name, domain in found["plain"].items()}
        lines = [
            [name, *(f"{loss:.3f}" for loss in (plain[name], *(domain["loss"][m] for m in MODES)))]
            for name, domain in found["retro"].items()
        ]
        header = [f"{text}, {found['steps']} steps", "without retrieval", *HEADS]
        parts.append(common.markdown(header, lines))
    return "\n\n".join(parts)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpora", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("cost", "worth"))
    parser.add_argument("--out", type=Path, default=common.RESULTS / "retro.json")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    if options.only and options.out.exists():
        result = json.loads(options.out.read_text())
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        build(options.corpora, scratch / "corpus")
        if options.only != "worth":
            result["cost"] = cost(scratch / "corpus", scratch, options.rounds)
        if options.only != "cost":
            text = "books and wiki" if options.corpora else "standard library"
            result.setdefault("worth", {})[text] = worth(scratch / "corpus", scratch, options.steps)
    named = "--corpora=DIR " if options.corpora else ""
    result["command"] = f"OMP_NUM_THREADS=1 python tools/bench/retro.py {named}--steps={options.steps}"
    result["machine"] = common.facts()
    common.save(result, options.out)
    print(table(result))


if __name__ == "__main__":
    main()
