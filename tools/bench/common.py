"""What the benches share: the tiny Llama, a corpus of random tokens, facts about the machine, files, tables.

A shared machine moves a median several-fold, so cases are interleaved (A, B, A, B, ...) and the fastest
block of each counts; the spread is kept beside it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megafab.data.format import Corpus, ShardWriter, split_entry, token_dtype, write_manifest

Clock = tuple[float, float]  # wall, CPU

RESULTS = Path(__file__).resolve().parent / "results"
VOCAB = 4096
SEQ_LEN = 256
GLOBAL_BATCH = 8
MICRO_BATCH = 4
TINY = (
    "model=llama_tiny",
    f"model.seq_len={SEQ_LEN}",
    f"model.vocab={VOCAB}",
    f"train.global_batch={GLOBAL_BATCH}",
    f"train.micro_batch={MICRO_BATCH}",
    "optim.lr=1e-3",
    "checkpoint.save_last=false",
)
TINY_TEXT = (
    f"llama_tiny, sequence {SEQ_LEN}, vocabulary {VOCAB}, batch {GLOBAL_BATCH}, micro-batch {MICRO_BATCH}"
)


def random_corpus(root: Path, tokens: int = 2_000_000, vocab: int = VOCAB) -> Corpus:
    """One domain of random documents of about 800 tokens, with a validation split of a twentieth."""
    rng = np.random.default_rng(0)
    splits = {}
    for split, share in (("train", 1.0), ("valid", 0.05)):
        writer = ShardWriter(root, f"{split}/random-00000", token_dtype(vocab))
        for length in rng.lognormal(6.2, 1.0, int(tokens * share / 800)).astype(int) + 2:
            ids = rng.integers(1, vocab, length, dtype=np.uint16)
            ids[-1] = 0
            writer.append(ids)
        splits[split] = split_entry([writer.close()], 0)
    tokenizer = {"vocab_size": vocab, "eod": 0, "fingerprint": "none"}
    write_manifest(root, {"tokenizer": tokenizer, "domains": [{"name": "random", "splits": splits}]})
    return Corpus.open(root)


def clock() -> Clock:
    """Now: wall seconds, and the seconds that all threads of this process have computed."""
    return time.perf_counter(), time.process_time()


def passed(began: Clock, ended: Clock) -> Clock:
    """From one reading to the next."""
    return ended[0] - began[0], ended[1] - began[1]


def facts() -> dict[str, Any]:
    """The machine and the versions that a number depends on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "python": platform.pythonversion(),
        "torch": version("torch"),
        "megatron_core": version("megatron-core"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The model, and what it has for bf16: two machines of one name may differ there."""
    fields = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    units = [unit for unit in ("avx512_bf16", "amx_bf16") if unit in fields.get("flags", "").split()]
    return f"{fields.get('model name', platform.machine())} ({', '.join(units) or 'no bf16 unit'})"


def run(script: str, *arguments: str) -> Any:
    """One case in a process of its own: what the last line of its output says in JSON."""
    done = subprocess.run([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def save(result: Mapping[str, Any], out: Path) -> None:
    """Write one JSON file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; what is not text is aligned to the right."""
    right = [any(not isinstance(row[column], str) for row in rows) for column in range(len(header))]
    lines = [header, ["---:" if r else "---" for r in right], *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
