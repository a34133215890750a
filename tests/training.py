"""Training runs for multi-process tests: a small corpus of real text, and `megafab train` on pool ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SMALL_MODEL = (
    "model=llama_tiny",
    "model.layers=4",
    "model.hidden=64",
    "model.heads=4",
    "model.kv_heads=2",
    "model.ffn=128",
    "model.seq_len=64",
)
SHORT_RUN = (
    "train.steps=20",
    "train.global_batch=8",
    "train.micro_batch=1",
    "optim.lr=1e-3",
    "schedule.warmup=2",
    "tracking=none",
    "eval.samples=4",
)


def build_corpus(root: Path) -> Path:
    """Code, tests and prose of the standard library, which changes with Python alone. Real shards."""
    from launch import data

    out = root / "corpus"
    arguments = ["stdlib_bytes=250000", "tokenizer.vocab=512", "valid_fraction=0.1", "workers=1"]
    assert data.main([f"out={out}", *arguments]) == 0
    return out


def train(rank: int, world: int, overrides: Sequence[str]) -> int:
    """`megafab train` as one rank of a job that something else started; for `ranks.run(..., init=False)`."""
    from launch import train as verb

    return verb.main(list(overrides))


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The logged steps of a run."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
