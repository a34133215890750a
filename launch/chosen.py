"""The checkpoint that a verb is told to work with, its run's configuration and the corpus."""

from __future__ import annotations

import sys
from pathlib import Path

from megafab.checkpoint import store
from megafab.config.schema import RunConfig
from megafab.config.tree import build
from megafab.data.format import Corpus
from megafab.errors import ConfigError


def chosen(where: str, data: str | None) -> tuple[Path, RunConfig, Corpus]:
    """The newest intact checkpoint at `where`, how its run was configured, and the corpus.

    Args:
        where: a run directory or a step directory.
        data: the corpus; null: that of the run.

    Raises:
        UserError: no checkpoint, no corpus, or a corpus with another tokenizer than the checkpoint's.
    """
    paths = store.locate(Path(where), key="checkpoint")
    checkpoint, damaged = store.first_intact(paths, store.quick_check)
    assert checkpoint is not None  # locate() has refused a place without any
    for problem in damaged:
        print(f"passing over a damaged checkpoint: {problem}", file=sys.stderr)
    state = store.read_state(checkpoint)
    run = build(RunConfig, state["config"])
    corpus = Corpus.open(data or run.data.path)
    if corpus.tokenizer_fingerprint != state["data"].get("tokenizer", corpus.tokenizer_fingerprint):
        raise ConfigError(
            f"data={data or run.data.path}",
            "another tokenizer than the checkpoint was trained with",
            "the corpus of the run, or one with its tokenizer",
            "name such a corpus with data=",
        )
    return checkpoint, run, corpus
