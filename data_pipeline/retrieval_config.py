"""What `megafab data retrieval` is told, and the checks that need no file."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from data_pipeline.config import at_least
from megafab.data.derived import NAME
from megafab.errors import ConfigError, ConfigErrors
from megafab.function import FORM, is_named

MODELS = ("transformers", "sentence_transformers")
ENCODERS = ("tfidf", *MODELS)
DIM = 256  # of tfidf


@dataclass(frozen=True, slots=True)
class RetrievalConfig:
    """Everything `megafab data retrieval` is told. `workers` and `overwrite` do not change the result."""

    path: str = MISSING  # directory of the corpus whose chunks get neighbours
    database: str | None = None  # directory of the corpus to retrieve from, of the same tokenizer; null: path
    name: str | None = (
        None  # of the results, PATH/neighbors/NAME and DATABASE/retrieval/NAME; null: ENCODER-CHUNK
    )
    chunk: int = 64  # tokens of a chunk
    neighbors: int = 20  # kept of each chunk: a window leaves out those of its own documents
    candidates: int = (
        200  # asked for in each file of the index; those of the chunk's own documents are left out
    )
    encoder: str = (
        "tfidf"  # tfidf, transformers, sentence_transformers, or a function of yours: package.module:function
    )
    encoder_model: str | None = (
        None  # of transformers and sentence_transformers: a directory, or a hub id in the cache
    )
    dim: int | None = None  # of tfidf: length of a vector; null: 256
    index: str | None = None  # as faiss names it; null: by the number of rows, see data_pipeline/README.md
    train_rows: int | None = (
        None  # that the index learns its lists and codes from; null: 64 a list, at least 65536
    )
    nprobe: int | None = None  # lists that are searched; null: a sixteenth of them
    ef_search: int | None = None  # nodes of a graph that are searched; null: 256
    shard_rows: int = 10_000_000  # of one file of the index
    workers: int = 2  # processes, and threads of faiss
    overwrite: bool = False  # replace results of the same name that were made from something else

    @property
    def out_name(self) -> str:
        """The name of the results."""
        return self.name or f"{self.encoder.rpartition(':')[2]}-{self.chunk}"


def check_retrieval(config: RetrievalConfig) -> None:
    """Refuse what cannot be computed, all problems at once.

    Raises:
        ConfigErrors: at least one value is out of range or contradicts another.
    """
    encoder, model = config.encoder, config.encoder_model
    least = {
        "chunk": (config.chunk, 2),
        "neighbors": (config.neighbors, 1),
        "candidates": (config.candidates, config.neighbors),
        "dim": (config.dim, 8),
        "train_rows": (config.train_rows, 1),
        "nprobe": (config.nprobe, 1),
        "ef_search": (config.ef_search, 1),
        "shard_rows": (config.shard_rows, 1),
        "workers": (config.workers, 1),
    }
    problems = [
        *(at_least(key, value, bound) for key, (value, bound) in least.items() if value is not None),
        None
        if encoder in ENCODERS or is_named(encoder)
        else ConfigError(
            f"encoder={encoder}",
            "an unknown encoder",
            f"{', '.join(ENCODERS)}, or a function as {FORM}",
            "encoder=tfidf, for example",
        ),
        ConfigError("encoder_model", "nothing", f"a model, as encoder={encoder}", "encoder_model=DIR")
        if encoder in MODELS and not model
        else None,
        ConfigError(
            f"encoder_model={model}", f"encoder={encoder}", " or ".join(MODELS), "leave encoder_model out"
        )
        if model and encoder not in MODELS
        else None,
        ConfigError(f"dim={config.dim}", f"encoder={encoder}", "encoder=tfidf", "leave dim out")
        if config.dim is not None and encoder != "tfidf"
        else None,
        None
        if NAME.fullmatch(config.out_name)
        else ConfigError(
            f"name={config.name}", "no name of a directory", "letters, digits, '_', '-', '.'", "another name"
        ),
    ]
    found = [problem for problem in problems if problem is not None]
    if found:
        raise ConfigErrors(found)
