"""How fast a retrieval database is built, what its indices find and what reading neighbours costs.

    OMP_NUM_THREADS=1 python tools/bench/retrieval.py [--corpus DIR] [--rounds 3] [--out FILE]

The corpus is copied into a temporary directory and built on one process: chunks of 64 tokens, `tfidf`.
`embed` is its encoder alone, `build` the whole of `megafab data retrieval`, both by CPU seconds. `indices`
have the rows of that database: recall@2 is the share of the two exact neighbours of a query that an index
finds as its first two, for about 2,000 query chunks of the validation split, or of the training split where
that is short. `useful` is how much of the chunk that follows a query, by idf, is among the ids of its two
neighbours and of what follows them. `read` is one window of 2048 tokens.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

from data_pipeline import build as data_build
from data_pipeline import chunks, retrieval
from data_pipeline.config import BuildConfig
from data_pipeline.retrieval_config import RetrievalConfig
from megafab.data import index
from megafab.data.config import Packing
from megafab.data.format import Corpus
from megafab.data.loader import WindowReader
from megafab.data.retrieval import Database, Neighbors

CHUNK, COUNT, SEQ_LEN, QUERIES = 64, 2, 2048, 2000


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="a built corpus; default: the standard library's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "retrieval.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "corpus"
        if options.corpus:
            derived = shutil.ignore_patterns("retrieval", "neighbors", "scores", "difficulty")
            shutil.copytree(options.corpus, root, ignore=derived)
        else:
            data_build.build(BuildConfig(out=str(root)))
        result = measure(Corpus.open(root), options.rounds)
    given = " --corpus=DIR" if options.corpus else ""
    command = f"OMP_NUM_THREADS=1 python tools/bench/retrieval.py{given} --rounds={options.rounds}"
    common.save({"command": command, **result, **common.facts()}, options.out)
    print(report(result))


def measure(corpus: Corpus, rounds: int) -> dict[str, Any]:
    """All that goes into the JSON but the command and the machine."""
    began = common.clock()
    retrieval.build(RetrievalConfig(path=str(corpus.path), workers=1, chunk=CHUNK, index="Flat"))
    wall, cpu = common.passed(began, common.clock())
    found = Neighbors.open(f"tfidf-{CHUNK}", corpus, CHUNK)
    asked = sum(tokens // CHUNK for split in ("train", "valid") for tokens in corpus.tokens(split))
    return {
        "corpus": {"domains": list(corpus.domains), "tokens": sum(corpus.tokens("train"))},
        "rows": found.database.rows,
        "query_chunks": asked,
        "build": {"wall_s": wall, "cpu_s": cpu, "chunks_per_cpu_s": (found.database.rows + asked) / cpu},
        "embed": embed(found.database, rounds),
        "useful": useful(found, corpus),
        "read": read(found, corpus, rounds),
        "indices": indices(found.database, corpus),
    }


def texts_of(corpus: Corpus, split: str, domain: int, most: int) -> list[np.ndarray]:
    """What the first query chunks of a domain are searched with."""
    stream = corpus.domain(split, domain)
    count = min(most, stream.tokens // CHUNK)
    if not count:
        return []
    asked = chunks.queries(stream, 0, count, CHUNK, corpus.eod)
    return chunks.texts(stream, asked.start_C, asked.end_C)


def embed(database: Database, rounds: int) -> dict[str, float]:
    """Chunks a CPU second of the encoder."""
    texts = texts_of(database.corpus, "train", 0, 16_384)
    times = [fastest(lambda: database.encoder.embed(texts), 1, time.process_time) for _ in range(rounds)]
    return {"chunks": len(texts), "chunks_per_cpu_s": len(texts) / min(times)}


def useful(found: Neighbors, corpus: Corpus) -> dict[str, float]:
    """The share of what follows, by idf, that two neighbours with their continuations have, or wrong ones."""
    encoder_idf = np.load(found.database.path / "idf.npy")
    shares: dict[str, list[float]] = {"right": [], "wrong": []}
    for domain in range(len(corpus.domains)):
        stream = corpus.domain("valid", domain)
        for at in range(min(stream.tokens // CHUNK - 1, 500)):
            follows = np.unique(stream.read((at + 1) * CHUNK, CHUNK))
            for name in shares:
                rows = found.read("valid", domain, at * CHUNK, 1, count=COUNT, wrong=name == "wrong")
                tokens, _ = found.database.read(rows.ravel(), 2 * CHUNK)
                mass = encoder_idf[follows]
                shares[name].append(float(mass[np.isin(follows, tokens)].sum() / mass.sum()))
    return {name: float(np.mean(values)) for name, values in shares.items()}


def read(found: Neighbors, corpus: Corpus, rounds: int) -> dict[str, float]:
    """Milliseconds a window: its tokens as the loader reads them, and its neighbours with their tokens."""
    domain = int(np.argmax(corpus.tokens("train")))
    windows = (corpus.tokens("train")[domain] - 1) // SEQ_LEN
    order = np.random.default_rng(0).permutation(windows)[:200]
    reader = WindowReader(corpus, "train", SEQ_LEN, Packing.document)

    def plain() -> None:
        for window in order:
            reader.read(np.array([domain]), np.array([window]), np.array([0]))

    def neighbors() -> None:
        for window in order:
            rows = found.read("train", domain, int(window) * SEQ_LEN, SEQ_LEN // CHUNK, count=COUNT)
            found.database.read(rows.ravel(), 2 * CHUNK)

    times = {name: fastest(call, rounds) for name, call in (("plain", plain), ("neighbors", neighbors))}
    return {f"{name}_ms": 1e3 * seconds / len(order) for name, seconds in times.items()}


def indices(database: Database, corpus: Corpus) -> list[dict[str, Any]]:
    """Recall, size and time of several indices of the same rows."""
    package = index.faiss()
    package.omp_set_num_threads(1)
    flat = package.read_index(str(database.path / index.index_file(0)))
    rows = flat.reconstruct_n(0, flat.ntotal)
    split = "valid" if sum(corpus.tokens("valid")) > CHUNK * 200 else "train"
    each = QUERIES // len(corpus.domains)
    texts = [text for d in range(len(corpus.domains)) for text in texts_of(corpus, split, d, each)]
    queries = database.encoder.embed([text for text in texts if len(text)])
    lists = 1 << round(np.log2(4 * np.sqrt(len(rows))))
    factories = [
        ("Flat", None),
        *((f"IVF{lists},Flat", share) for share in (64, 16, 4)),
        ("HNSW32", None),
        (f"IVF{lists},PQ32", 16),
        (f"OPQ32_256,IVF{lists}_HNSW32,PQ32", 16),
    ]
    _, exact = flat.search(queries, COUNT)
    made: dict[str, tuple[Any, float]] = {}
    found = []
    for factory, share in factories:
        if factory not in made:
            began = common.clock()
            one = index.create(factory, rows.shape[1])
            if not one.is_trained:
                index.train(one, rows[: max(64 * lists, 1 << 16)], factory)
            one.add(rows)
            made[factory] = one, common.passed(began, common.clock())[1]
        one, cpu = made[factory]
        parameters = index.search_parameters(one, share and max(1, lists // share), None)
        for name, value in parameters.items():
            package.ParameterSpace().set_index_parameter(one, name, value)
        began = common.clock()
        _, got = one.search(queries, COUNT)
        searched = common.passed(began, common.clock())[1]
        hits = [len(set(a) & set(b)) for a, b in zip(got.tolist(), exact.tolist(), strict=True)]
        print(f"{factory}: {cpu:.0f} CPU seconds", flush=True)
        found.append(
            {
                "index": factory,
                "search": parameters,
                "recall_at_2": sum(hits) / (COUNT * len(queries)),
                "bytes_a_row": len(package.serialize_index(one)) / len(rows),
                "build_cpu_s": cpu,
                "queries_per_cpu_s": len(queries) / searched,
            }
        )
    return found


def fastest(call: Callable[[], object], rounds: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of the fastest of several calls."""
    times = []
    for _ in range(rounds):
        began = clock()
        call()
        times.append(clock() - began)
    return min(times)


def report(result: dict[str, Any]) -> str:
    """The table of indices, and the other numbers in a line each."""
    rows = [
        [
            one["index"],
            ", ".join(f"{name} {value}" for name, value in one["search"].items()),
            round(one["recall_at_2"], 3),
            round(one["bytes_a_row"]),
            round(one["build_cpu_s"], 1),
            round(one["queries_per_cpu_s"]),
        ]
        for one in result["indices"]
    ]
    header = ["index", "search", "recall@2", "bytes a row", "build, CPU s", "queries/CPU s"]
    reading, useful_ = result["read"], result["useful"]
    return "\n".join(
        [
            common.markdown(header, rows),
            "",
            f"{result['rows']:,} rows; tfidf {result['embed']['chunks_per_cpu_s']:,.0f} chunks a CPU second, "
            f"the whole build {result['build']['chunks_per_cpu_s']:,.0f}",
            f"a window of {SEQ_LEN} tokens {reading['plain_ms']:.2f} ms, "
            f"its neighbours {reading['neighbors_ms']:.2f} ms",
            f"of what follows, neighbours have {useful_['right']:.3f}, wrong ones {useful_['wrong']:.3f}",
        ]
    )


if __name__ == "__main__":
    main()
