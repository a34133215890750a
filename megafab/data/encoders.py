"""What turns a chunk into a vector to search by: unit length, compared by inner product.

    tfidf                    ids, weighted by how rare they are and projected: needs no model
    transformers             mean of a BERT-like model's last states over the chunk's decoded text
    sentence_transformers    what such a model makes of the decoded text
    package.module:function  what yours returns for a list of texts

An encoder is made where a database is built, and again where queries are encoded, maybe long after. What its
manifest keeps for that, the settings, has a hash of all that vectors depend on: counts, model, code.

Shape suffixes: N texts, E length of a vector, V token ids.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megafab.data import order
from megafab.data.format import Corpus
from megafab.data.tokenizer import Tokenizer
from megafab.errors import UserError
from megafab.function import load_function

IDF = "idf.npy"
_BATCH = 64  # texts that a model takes at a time
_TOKENS = 256  # of a text that a model sees: RETRO's chunks are 64 of GPT's
_SAMPLE = "The quick brown fox jumps over the lazy dog."  # to learn the length of a vector from


class Encoder(Protocol):
    """`dim` is E."""

    dim: int

    def embed(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        """Vectors of unit length, float32 [N, E], of texts given as ids without EOD; 0 for an empty text."""
        ...


def settings(kind: str, model: str | None, dim: int) -> dict[str, Any]:
    """What a database's manifest says of its encoder; for `tfidf` add the `sha256` of what it has counted.

    Raises:
        UserError: a package, a model or a function is not there.
    """
    if kind == "tfidf":
        return {"kind": kind, "dim": dim}
    return {"kind": kind, "model": model, "sha256": _source_hash(kind, model)}


def load(directory: Path, made_with: Mapping[str, Any], corpus: Corpus) -> Encoder:
    """The encoder of a database.

    Args:
        directory: of the database, where `tfidf` keeps what it has counted.
        made_with: its settings, with `sha256`.
        corpus: that of the database, whose tokenizer decodes texts.

    Raises:
        UserError: a package, a model or a function is not there, is another than at that time, or does not
            return vectors.
    """
    kind, model = made_with["kind"], made_with.get("model")
    found = file_hash(directory / IDF) if kind == "tfidf" else _source_hash(kind, model)
    if found != made_with["sha256"]:
        raise UserError(
            f"{directory}, encoder {model or kind}",
            f"files that hash to {found[:12]}",
            f"those that the database was made with, {made_with['sha256'][:12]}",
            "restore them, or build the database again: megafab data retrieval ... overwrite=true",
        )
    if kind == "tfidf":
        return TfIdf(np.load(directory / IDF), made_with["dim"])
    if kind == "transformers":
        embed = _transformers(_model_directory(model))
    elif kind == "sentence_transformers":
        embed = _sentence_transformers(_model_directory(model))
    else:
        embed = load_function("encoder", kind)
    return _OfTexts(kind, embed, Tokenizer.load(corpus.tokenizer_dir))


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TfIdf:
    """Term frequency times inverse document frequency over ids, randomly projected.

    A text's vector is the sum of `idf_v * s_v` over its ids v, with `s_v` in {-1, 1}^E drawn by a hash: inner
    products are those of V-long vectors up to an error of about 1 / sqrt(E) (Achlioptas 2003,
    "Database-friendly random projections"). Pairs of neighbouring ids as further terms made it worse.

    Args:
        idf_V: float32, what `idf` returns.
        dim: E.
    """

    def __init__(self, idf_V: np.ndarray, dim: int) -> None:
        import torch

        self.dim = dim
        words = -(-dim // 64)
        key = np.array([order.stream_key("tfidf", dim)], np.uint64)
        bits = order.random_bits(key, np.arange(len(idf_V) * words)).reshape(len(idf_V), words)
        bits_VE = np.unpackbits(bits.astype("<u8").view(np.uint8), axis=1)[:, :dim]
        self._weight_VE = torch.from_numpy(idf_V[:, None] * (2 * bits_VE.astype(np.float32) - 1))

    def embed(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        """See `Encoder`."""
        import torch
        from torch.nn.functional import embedding_bag

        ids, length_N = _joined(texts)
        if not len(ids):
            return np.zeros((len(texts), self.dim), np.float32)
        first_N = np.cumsum(length_N) - length_N
        bags = torch.from_numpy(ids), self._weight_VE, torch.from_numpy(first_N)
        return unit(embedding_bag(*bags, mode="sum").numpy())


def document_frequencies(texts: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
    """In how many of the texts each id is: int64 [V]."""
    ids, length_N = _joined(texts)
    # Sorted here: np.unique takes forty times as long for so many.
    key = np.sort(np.repeat(np.arange(len(texts)), length_N) * vocab_size + ids)
    once = key[np.diff(key, prepend=-1) > 0]
    return np.bincount(once % vocab_size, minlength=vocab_size)


def idf(counts_V: np.ndarray, texts: int) -> np.ndarray:
    """`log((1 + N) / (1 + n_v))` of ids that are in n_v of N texts: float32 [V]."""
    return np.log((1 + texts) / (1 + counts_V)).astype(np.float32)


def _joined(texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all texts one after the other, and how many each has: int64."""
    return np.concatenate([np.empty(0, np.int64), *texts]), np.array([len(text) for text in texts], np.int64)


def unit(vectors_NE: np.ndarray) -> np.ndarray:
    """Vectors divided by their length; 0 stays 0."""
    length_N1 = np.linalg.norm(vectors_NE, axis=1, keepdims=True)
    return np.divide(vectors_NE, length_N1, out=np.zeros_like(vectors_NE), where=length_N1 > 0)


class _OfTexts:
    """`function` takes texts and returns an array [N, E]; here its answer is checked."""

    def __init__(self, name: str, function: Callable[[list[str]], Any], tokenizer: Tokenizer) -> None:
        self._name, self._function, self._tokenizer = name, function, tokenizer
        self.dim = self._call([_SAMPLE]).shape[1]

    def embed(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        """See `Encoder`."""
        vectors_NE = np.zeros((len(texts), self.dim), np.float32)
        decoded = [self._tokenizer.decode(text.tolist()) if len(text) else "" for text in texts]
        there = np.array([bool(text.strip()) for text in decoded])
        if there.any():
            found_NE = self._call(list(itertools.compress(decoded, there)))
            if found_NE.shape[1] != self.dim:
                found = f"vectors of {found_NE.shape[1]} numbers"
                raise self._error(found, f"{self.dim} as for the first text")
            vectors_NE[there] = found_NE
        return unit(vectors_NE)

    def _call(self, texts: list[str]) -> np.ndarray:
        found = np.asarray(self._function(texts))
        if found.ndim != 2 or len(found) != len(texts) or not found.shape[1] or found.dtype.kind not in "fiu":
            raise self._error(f"{found.shape} of {found.dtype}", f"numbers of shape ({len(texts)}, E)")
        if not np.isfinite(found).all():
            raise self._error("nan or infinity", "finite numbers")
        return found.astype(np.float32)

    def _error(self, found: str, expected: str) -> UserError:
        return UserError(
            f"encoder={self._name}", found, f"{expected} for {_SAMPLE!r} or a chunk", "correct it"
        )


def _transformers(directory: Path) -> Callable[[list[str]], np.ndarray]:
    """Mean of the last layer's states over the tokens that are not special, as RETRO takes BERT's."""
    import torch

    transformers = _package("transformers", "transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model = transformers.AutoModel.from_pretrained(directory, local_files_only=True).eval()
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(str(directory), error) from None

    @torch.inference_mode()
    def embed(texts: list[str]) -> np.ndarray:
        means = []
        for batch in _batches(texts):
            asked = tokenizer(
                batch,
                padding=True,
                truncation=True,
                max_length=_TOKENS,
                return_special_tokens_mask=True,
                return_tensors="pt",
            )
            plain = asked["attention_mask"] * (1 - asked.pop("special_tokens_mask"))
            states = model(**asked).last_hidden_state.float() * plain.unsqueeze(-1)
            means.append(states.sum(1) / plain.sum(1, keepdim=True).clamp(min=1))
        return torch.cat(means).numpy()

    return embed


def _sentence_transformers(directory: Path) -> Callable[[list[str]], np.ndarray]:
    package = _package("sentence_transformers", "sentence-transformers")
    try:
        model = package.SentenceTransformer(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(str(directory), error) from None
    return lambda texts: model.encode(texts, batch_size=_BATCH, convert_to_numpy=True)


def _batches(texts: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(texts), _BATCH):
        yield texts[start : start + _BATCH]


def _package(name: str, pip: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise  # the package is there, and misses another
        found, expected = f"no package {name}", "it installed"
        raise UserError(f"encoder={name}", found, expected, f"pip install {pip}") from None


def _model_directory(model: str | None) -> Path:
    """Where the files of a model are: a directory, or the cache of a hub id; nothing is downloaded."""
    assert model is not None
    if Path(model).expanduser().is_dir():
        return Path(model).expanduser()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError) as error:
        raise _unusable(model, error) from None


def _unusable(model: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()
    return UserError(
        f"encoder_model={model}",
        f"no usable model ({reason[0] if reason else type(error).__name__})",
        "the directory of a model, or a hub id whose files are in the cache",
        "correct the path, or download it first: hf download ID",
    )


def _source_hash(kind: str, model: str | None) -> str:
    """sha256 over the files that vectors depend on: those of the model, or the function's module."""
    if kind in ("transformers", "sentence_transformers"):
        _package(kind, kind.replace("_", "-"))
        root = _model_directory(model)
        files = sorted(path for path in root.rglob("*") if path.is_file())
    else:
        load_function("encoder", kind)
        module = importlib.import_module(kind.partition(":")[0]).__file__
        assert module is not None
        root, files = Path(module).parent, [Path(module)]
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(root)}\0{file_hash(path)}\0".encode())
    return digest.hexdigest()
