"""Text to token ids and back, behind one small interface.

The tokenizers `megafab data` trains are SentencePiece models that lose nothing: for every text that is
valid Unicode, `decode(encode(text)) == text`. Given tokenizers (SentencePiece or Hugging Face
`tokenizer.json`) are used as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megafab.errors import UserError

SENTENCEPIECE_FILE, HF_FILE, HF_CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
OWN_FILE = "megafab.json"  # beside a SentencePiece model that `megafab data` trained: {"type": "bpe"}

# Tried in this order when a given tokenizer does not name its own end of document.
EOD_CANDIDATES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")

# SentencePiece writes a space as this character; see `_SentencePiece._encode`.
_SPACE = "\u2581"
# Ways to cut a text into words such that no token crosses a cut, finest first; see `_find_words`.
_LATIN = "a-zA-Z\u00c0-\u024f"
_WORDS = (re.compile(f" *(?:[{_LATIN}]+|[^{_LATIN} ]+)| +"), re.compile(" *[^ ]+| +"))
_CACHED_WORDS, _CACHED_LENGTH = 500_000, 32
_SLICE = 1 << 20  # characters of a long document encoded at once
_CUT = re.compile("(?<=[^ ])(?= )")
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class _Backend(Protocol):
    vocab_size: int
    eod: int

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...
    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def byte_lengths(self) -> np.ndarray: ...


class Tokenizer:
    """One tokenizer. `vocab_size` ids, of which `eod` ends a document and never comes from text."""

    def __init__(self, backend: _Backend) -> None:
        self._backend = backend
        self.vocab_size, self.eod = backend.vocab_size, backend.eod

    @staticmethod
    def load(directory: str | Path) -> Tokenizer:
        """Load a directory with `tokenizer.model` or `tokenizer.json`, or such a file itself.

        Raises:
            UserError: nothing of the kind there, a file that cannot be read, no end-of-document token.
        """
        path = find_tokenizer(Path(directory))
        return Tokenizer(_HuggingFace(path) if path.suffix == ".json" else _SentencePiece(path))

    def encode(self, text: str) -> list[int]:
        """Ids of one text, no EOD added."""
        return self._backend.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of many texts on one thread, no EOD added. Faster than one by one."""
        return self._backend.encode_batch(texts)

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """As `encode_batch`, but int32 arrays: the fastest way from text to a file."""
        return self._backend.encode_arrays(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control ids (EOD) stand for nothing."""
        return self._backend.decode([int(index) for index in ids])

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes each id stands for, int32 [vocab_size]; 0 for EOD and other control ids.

        Turns a loss per token into bits per byte.
        """
        return self._backend.byte_lengths()


def find_tokenizer(path: Path) -> Path:
    """The tokenizer file that `path` is or holds; UserError when there is none."""
    if path.is_file():
        return path
    for name in (SENTENCEPIECE_FILE, HF_FILE):
        if (path / name).is_file():
            return path / name
    models = sorted(path.glob("*.model"))
    if len(models) == 1:
        return models[0]
    found = "no such file or directory" if not path.exists() else "a directory without a tokenizer"
    expected = f"{SENTENCEPIECE_FILE} (SentencePiece) or {HF_FILE} (Hugging Face)"
    raise UserError(str(path), found, expected, "give the path of one of these files")


def tokenizer_fingerprint(directory: Path) -> str:
    """sha256 over names and content of the files in a corpus' tokenizer directory."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


class _SentencePiece:
    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise _unreadable(path, "SentencePiece model", error) from None
        self.vocab_size = self._model.get_piece_size()
        self.eod = self._find_eod(path)
        # Byte pieces spelling U+2581; None when the model has no byte fallback.
        spelled = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._spelled = spelled if all(self._model.is_byte(index) for index in spelled) else None
        own = path.with_name(OWN_FILE)
        self._own = own.is_file()
        bpe = self._own and json.loads(own.read_bytes())["type"] == "bpe"
        self._words = self._find_words() if bpe else None
        self._cache: dict[str, list[int]] = {}

    def _find_eod(self, path: Path) -> int:
        if self._model.eos_id() >= 0:
            return self._model.eos_id()
        ids = [self._model.piece_to_id(name) for name in EOD_CANDIDATES]
        known = [index for index in ids if not self._model.is_unknown(index)]
        if not known:
            raise _no_eod(path)
        return known[0]

    def _find_words(self) -> re.Pattern[str] | None:
        """The finest way to cut a text into words that leaves BPE's result as it is.

        Whether there is a cut depends on the two characters around it only. So when no piece of the
        vocabulary would be cut, no merge can cross a cut, and words may be encoded one by one.
        """
        model = self._model
        special = (model.is_byte, model.is_control, model.is_unknown)
        plain = [i for i in range(self.vocab_size) if not any(kind(i) for kind in special)]
        pieces = [model.id_to_piece(index).replace(_SPACE, " ") for index in plain]
        fit = (words for words in _WORDS if all(words.findall(piece) == [piece] for piece in pieces))
        return next(fit, None)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Our own models take long texts in slices and, where they are BPE, repeated words from a cache."""
        if not self._own:
            return self._encode(texts)
        encode = self._encode if self._words is None else self._encode_words
        if all(len(text) <= _SLICE for text in texts):
            return encode(texts)
        return [list(chain.from_iterable(encode([part])[0] for part in _slices(text))) for text in texts]

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """The library's own arrays where nothing has to be put together, which saves a third of the time."""
        if self._words is None and not any(_SPACE in text or len(text) > _SLICE for text in texts):
            return self._model.encode(texts, num_threads=1, return_type="numpy")
        return _arrays(self.encode_batch(texts))

    def _encode_words(self, texts: list[str]) -> list[list[int]]:
        """As `_encode`, for BPE: more than twice as fast, since most words of a text were seen before."""
        assert self._words is not None
        words = [self._words.findall(text) for text in texts]
        fresh = list(set().union(*words).difference(self._cache))
        if len(self._cache) + len(fresh) > _CACHED_WORDS:
            self._cache.clear()
            fresh = list(set().union(*words))
        self._cache.update(zip(fresh, self._encode(fresh), strict=True))
        lookup = self._cache.__getitem__
        out = [list(chain.from_iterable(map(lookup, parts))) for parts in words]
        for word in fresh:
            if len(word) > _CACHED_LENGTH:
                del self._cache[word]
        return out

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """SentencePiece takes U+2581 in a text for a space, so it is spelled in bytes around the library."""
        if self._spelled is None or not any(_SPACE in text for text in texts):
            return self._model.encode(texts, num_threads=1)
        pieces = [text.split(_SPACE) for text in texts]
        encoded = iter(self._model.encode(list(chain.from_iterable(pieces)), num_threads=1))
        out = []
        for parts in pieces:
            ids = list(next(encoded))
            for _ in parts[1:]:
                ids += self._spelled
                ids += next(encoded)
            out.append(ids)
        return out

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids))

    def byte_lengths(self) -> np.ndarray:
        model = self._model

        def length(index: int) -> int:
            if model.is_control(index) or model.is_unknown(index) or model.is_unused(index):
                return 0
            if model.is_byte(index):
                return 1
            return len(model.id_to_piece(index).replace(_SPACE, " ").encode())

        return np.array([length(index) for index in range(self.vocab_size)], dtype=np.int32)


def _slices(text: str) -> Iterator[str]:
    """Cut a long text before spaces: there no token is cut, and memory does not grow with the text."""
    start = 0
    while len(text) - start > _SLICE:
        cut = _CUT.search(text, start + _SLICE, start + 2 * _SLICE)
        end = cut.start() if cut else start + _SLICE
        yield text[start:end]
        start = end
    yield text[start:]


class _HuggingFace:
    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._description: dict[str, Any] = json.loads(path.read_bytes())
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise _unreadable(path, "Hugging Face tokenizer", error) from None
        # Text that spells a special token is text: an EOD comes from the end of a document alone.
        self._model.encode_special_tokens = True
        self._model.no_padding()
        self._model.no_truncation()
        self._vocab = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values()) + 1
        self.eod = self._find_eod(path)

    def _find_eod(self, path: Path) -> int:
        names = list(EOD_CANDIDATES)
        config = path.with_name(HF_CONFIG_FILE)
        if config.is_file():
            eos = json.loads(config.read_bytes()).get("eos_token")
            names.insert(0, eos["content"] if isinstance(eos, dict) else eos)
        known = [self._vocab[name] for name in names if name in self._vocab]
        if not known:
            raise _no_eod(path)
        return known[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # One by one: encode_batch would start threads in every worker process.
        return [self._model.encode(text, add_special_tokens=False).ids for text in texts]

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        return _arrays(self.encode_batch(texts))

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([index for index in ids if index != self.eod], skip_special_tokens=False)

    def byte_lengths(self) -> np.ndarray:
        special = {entry["id"] for entry in self._description["added_tokens"] if entry["special"]}
        added = {entry["id"] for entry in self._description["added_tokens"]}
        # In a byte-level vocabulary every character of a piece stands for one byte.
        byte_level = '"ByteLevel"' in json.dumps(self._description.get("decoder"))
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for piece, index in self._vocab.items():
            if index in special:
                continue
            if byte_level and index not in added:
                lengths[index] = len(piece)
            elif _BYTE_PIECE.fullmatch(piece):
                lengths[index] = 1
            else:
                lengths[index] = len(piece.replace(_SPACE, " ").encode())
        lengths[self.eod] = 0
        return lengths


def _arrays(batch: list[list[int]]) -> list[np.ndarray]:
    return [np.array(ids, dtype=np.int32) for ids in batch]


def _unreadable(path: Path, kind: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()
    found = f"a file that cannot be read ({reason[0] if reason else type(error).__name__})"
    return UserError(str(path), found, f"a {kind}", "give another file, or train one: tokenizer.type=bpe")


def _no_eod(path: Path) -> UserError:
    expected = f"one of {', '.join(EOD_CANDIDATES)}"
    return UserError(str(path), "no end-of-document token", expected, "add one of these to the tokenizer")
