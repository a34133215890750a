"""Retrieval as a run is configured: which neighbours its windows are read with."""

from __future__ import annotations

from megafab.config.schema import RunConfig
from megafab.data.format import Corpus
from megafab.data.retrieval import Neighbors
from megafab.data.retrieved import Retrieval


def of(config: RunConfig, corpus: Corpus, *, wrong: bool = False) -> Retrieval | None:
    """What a run reads beside windows of a corpus; None for a model that looks at no neighbours.

    Args:
        config: of the run; its rules have passed.
        corpus: the corpus whose windows are read.
        wrong: chunks drawn at random stand where neighbours would.

    Raises:
        UserError: the neighbours cannot be used, or there are fewer than asked for.
    """
    retro = config.model.retro
    if not retro.chunk:
        return None
    assert config.data.retrieval is not None, "the rules have passed"
    neighbors = Neighbors.open(config.data.retrieval, corpus, retro.chunk)
    return Retrieval(neighbors, retro.neighbors, retro.retrieved or 2 * retro.chunk, wrong)
