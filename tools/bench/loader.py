"""Speed of `Loader.take`, and of Megatron's GPTDataset on the same shards.

    python tools/bench/loader.py [--corpus DIR] [--tokens 50000000] [--megatron] [--out FILE]

Without `--corpus` it writes synthetic shards of two domains to a temporary directory. Each case takes
steps back to back, as no training does, so the rate with prefetch is what the thread alone can sustain;
`busy_wait_ms` is what a step waits for its batch when it computes for twice as long as a read takes.
Each case runs in three rounds and the fastest counts, so that pages are mapped and a neighbour's load
weighs less; `slowest_round_tokens_per_second` shows the spread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from megafab.data.config import Packing
from megafab.data.format import Corpus, ShardWriter, split_entry, token_dtype, write_manifest
from megafab.data.loader import Loader
from megafab.data.mixture import weights
from megafab.run import StepPlan

SIZES = ((256, 16), (2048, 64))  # sequence length, sequences a step
ROUNDS = 3
VOCAB = 32_000


def synthetic_corpus(root: Path, tokens: int) -> Corpus:
    """Two domains of random documents of about 800 tokens, three to one."""
    rng = np.random.default_rng(0)
    domains = []
    for name, share in (("books", 0.75), ("code", 0.25)):
        shards = []
        for number in range(2):
            lengths = rng.lognormal(6.2, 1.0, int(tokens * share / 1600)).astype(int) + 2
            writer = ShardWriter(root, f"train/{name}-{number:05d}", token_dtype(VOCAB))
            for length in lengths:
                ids = rng.integers(1, VOCAB, length, dtype=np.uint16)
                ids[-1] = 0
                writer.append(ids)
            shards.append(writer.close())
        splits = {"train": split_entry(shards, 0), "valid": split_entry((), 0)}
        domains.append({"name": name, "splits": splits})
    tokenizer = {"vocab_size": VOCAB, "eod": 0, "fingerprint": "none"}
    write_manifest(root, {"tokenizer": tokenizer, "domains": domains})
    return Corpus.open(root)


def loader_case(
    corpus: Corpus, seq_len: int, rows: int, packing: Packing, prefetch: bool, seconds: float
) -> dict[str, Any]:
    """One loader taking steps back to back for about `seconds`."""
    loader = Loader(
        corpus,
        split="train",
        seed=1234,
        seq_len=seq_len,
        packing=packing,
        data_rank=0,
        data_ranks=1,
        prefetch=prefetch,
    )
    plan = StepPlan(
        step=0,
        lr=0.0,
        weight_decay=0.0,
        global_batch=rows,
        micro_batch=rows,
        micro_batches=1,
        seq_len=seq_len,
        domain_weights=weights(None, corpus),
    )
    rounds = [_timed(lambda: loader.take(plan), seconds) for _ in range(ROUNDS)]
    result: dict[str, Any] = {
        "seq_len": seq_len,
        "batch": rows,
        "packing": packing.value,
        "prefetch": prefetch,
        **_rates(rounds, rows, seq_len),
    }
    if prefetch:
        waits = []
        for _ in range(20):
            time.sleep(2e-3 * result["take_ms"])  # the step's compute, off this core
            waits += _timed(lambda: loader.take(plan), 0.0)
        result["busy_wait_ms"] = round(1e3 * median(waits), 3)
    loader.close()
    return result


def megatron_case(corpus: Corpus, seq_len: int, rows: int, cache: Path, seconds: float) -> dict[str, Any]:
    """Megatron's GPTDataset over the first domain's first shard, in process, collated by torch.stack.

    Positions and mask are computed for every sample, as megafab's are (`reset_position_ids`,
    `eod_mask_loss`); the attention mask is left out.
    """
    import torch
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokens:
        """The little of a tokenizer that GPTDataset asks for."""

        eod, pad, bos, vocab_size = 0, None, None, VOCAB
        unique_identifiers = {"class": "bench"}

    shard = str(corpus.path / f"train/{corpus.domains[0]}-00000")
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=seq_len,
        blend=([shard], None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=Tokens(),  # type: ignore[arg-type]
        reset_position_ids=True,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(shard)
    documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
    began = time.perf_counter()
    dataset = GPTDataset(indexed, shard, documents, None, Split.train, config)
    build = time.perf_counter() - began

    def batches():
        at = 0
        while True:
            samples = [dataset[(at + row) % len(dataset)] for row in range(rows)]
            yield {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
            at += rows

    stream = batches()
    rounds = [_timed(lambda: next(stream), seconds) for _ in range(ROUNDS)]
    return {"seq_len": seq_len, "batch": rows, "build_s": round(build, 3), **_rates(rounds, rows, seq_len)}


def _timed(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call, one after the other for `seconds`, at least one."""
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while not times or time.perf_counter() < deadline:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times


def _rates(rounds: list[list[float]], rows: int, seq_len: int) -> dict[str, Any]:
    means = [sum(times) / len(times) for times in rounds]
    return {
        "steps": sum(len(times) for times in rounds),
        "take_ms": round(1e3 * min(means), 3),
        "samples_per_second": round(rows / min(means)),
        "tokens_per_second": round(rows * seq_len / min(means)),
        "slowest_round_tokens_per_second": round(rows * seq_len / max(means)),
    }


def main() -> None:
    """Runs every case and writes one JSON file."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="a built corpus; default: synthetic shards")
    parser.add_argument("--tokens", type=int, default=50_000_000, help="size of the synthetic corpus")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each round")
    parser.add_argument("--megatron", action="store_true", help="GPTDataset on the first shard, too")
    parser.add_argument("--out", type=Path, default=here / "results" / "loader.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        corpus = (
            Corpus.open(options.corpus)
            if options.corpus
            else synthetic_corpus(root / "corpus", options.tokens)
        )
        loaders = [
            loader_case(corpus, seq_len, rows, packing, prefetch, options.seconds)
            for seq_len, rows in SIZES
            for packing in Packing
            for prefetch in (False, True)
        ]
        megatron = [
            megatron_case(corpus, seq_len, rows, root / f"cache-{seq_len}", options.seconds)
            for seq_len, rows in SIZES
            if options.megatron
        ]
        result = {
            "command": "python tools/bench/loader.py" + (" --megatron" if options.megatron else ""),
            "corpus": "built" if options.corpus else "synthetic",
            "tokens": sum(corpus.tokens("train")),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "cpus": os.cpu_count(),
            "load_average": [round(value, 1) for value in os.getloadavg()],
            "loader": loaders,
            "megatron_gpt_dataset": megatron,
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
