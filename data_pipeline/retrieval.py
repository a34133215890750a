"""`megafab data retrieval`: a database of chunks, and for each chunk of a corpus those that are near it.

What rows, query chunks and neighbours are is said in `megafab/data/retrieval.py`. `database.py` builds the
database, `neighbors.py` finds the neighbours. Each is left as it is where it is finished, and goes on after a
kill: work happens beside the result (`workspace.py`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline import database, neighbors
from data_pipeline.pool import Pool
from data_pipeline.retrieval_config import RetrievalConfig, check_retrieval
from megafab.data import index
from megafab.data.format import SPLITS, Corpus
from megafab.data.retrieval import Neighbors, require_tokenizer
from megafab.errors import UserError


def build(config: RetrievalConfig) -> None:
    """Build the database and the neighbours that `config` asks for, unless they are there already.

    Raises:
        UserError: bad configuration or input, one line each; nothing is left behind.
        Interrupted: the machine failed (disk full, process killed); the next call continues.
    """
    check_retrieval(config)
    index.faiss().omp_set_num_threads(config.workers)
    corpus = Corpus.open(Path(config.path).expanduser())
    retrieved = corpus if config.database is None else Corpus.open(Path(config.database).expanduser())
    require_tokenizer(retrieved, corpus)
    with Pool(config.workers) as pool:
        found = database.build(config, retrieved, pool)
        neighbors.build(config, corpus, found, pool)
    _report(config, corpus)


def _report(config: RetrievalConfig, corpus: Corpus) -> None:
    """How many chunks have neighbours, domain by domain."""
    found = Neighbors.open(config.out_name, corpus, config.chunk)
    rows, helped = found.database.rows, 0
    print(f"{rows:,} rows in {found.database.path}, index {found.database.manifest['index']}")
    for split in SPLITS:
        for domain, name in enumerate(corpus.domains):
            chunks = corpus.tokens(split)[domain] // config.chunk
            with_CK = found.rows(split, domain) >= 0
            with_one, kept = int(with_CK.any(axis=1).sum()), float(np.sum(with_CK) / max(1, chunks))
            helped += with_one
            print(
                f"  {split} {name}: {with_one:,} of {chunks:,} chunks have neighbours, {kept:.1f} on average"
            )
    if not helped:
        raise UserError(
            str(found.path),
            "no chunk with a neighbour",
            "some: those of a chunk's own document are left out",
            "a corpus of more documents, or database=DIR with other text",
        )
