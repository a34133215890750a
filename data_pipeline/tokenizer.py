"""The tokenizer of a corpus: trained on a sample of all domains, or given."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from data_pipeline.config import TokenizerConfig, TokenizerType
from data_pipeline.documents import Bad
from data_pipeline.sources import Source
from megafab.data.tokenizer import (
    HF_CONFIG_FILE,
    HF_FILE,
    OWN_FILE,
    SENTENCEPIECE_FILE,
    Tokenizer,
    find_tokenizer,
)
from megafab.errors import ConfigError, UserError

_PIECES = 64  # places a domain's sample comes from
_SENTENCE = 4000  # characters SentencePiece is shown at once
# The result depends on the number of threads SentencePiece trains with (order of floating-point sums),
# so it is a constant and not `workers`.
_THREADS = 2


def sample(sources: Mapping[str, list[Source]], text_key: str, size: int, skip_bad: bool) -> list[str]:
    """Documents of about `size` characters, an equal share from each domain as far as it has them.

    Within a domain up to 64 places spread over it give an equal share each. Of a compressed file or
    a stream only the beginning is read.

    Raises:
        UserError: a domain without a single document; says what is wrong with the first.
    """
    texts: list[str] = []
    left = size
    # Small domains first: what they cannot give goes to the others.
    by_size = sorted(sources, key=lambda domain: (_size(sources[domain]), domain))
    for index, domain in enumerate(by_size):
        found = _sample_domain(sources[domain], text_key, left // (len(by_size) - index))
        # Nothing good where the sample looked: look everywhere, or say what is bad.
        found = found or _first_document(sources[domain], text_key, skip_bad)
        if not found:
            fix = "give sources with text, or leave the domain out"
            raise UserError(f"sources.{domain}", "no documents with text", "at least one", fix)
        texts += found
        left -= sum(map(len, found))
    return texts


def _size(sources: list[Source]) -> float:
    return sum(float("inf") if source.size is None else source.size for source in sources)


def _sample_domain(sources: list[Source], text_key: str, size: int) -> list[str]:
    places = [piece for source in sources if source.seekable for piece in source.pieces(text_key, True)]
    step = max(1, -(-len(places) // _PIECES))
    texts = []
    for piece in places[::step]:
        texts += _prefix(piece.documents(text_key), size // min(_PIECES, len(places)))
    streams = [source for source in sources if not source.seekable]
    step = max(1, -(-len(streams) // _PIECES))
    left = size - sum(map(len, texts))
    for source in streams[::step]:
        for piece in islice(source.pieces(text_key, True), 1):
            texts += _prefix(piece.documents(text_key), left // min(_PIECES, len(streams)))
    return texts


def _first_document(sources: list[Source], text_key: str, skip_bad: bool) -> list[str]:
    """The first good document, and an error for a bad one before it unless those are skipped."""
    for source in sources:
        for piece in source.pieces(text_key, skip_bad):
            for document in piece.documents(text_key):
                if isinstance(document, Bad) and not skip_bad:
                    raise document.error
                if isinstance(document, str) and document:
                    return [document]
    return []


def _prefix(documents: Iterator[str | Bad], size: int) -> list[str]:
    """Documents until `size` characters, the last one cut. Bad ones are met again, and judged, later."""
    texts = []
    for document in documents:
        if isinstance(document, str) and document:
            texts.append(document[: max(1, size)])
            size -= len(document)
            if size <= 0:
                break
    return texts


def train(config: TokenizerConfig, texts: list[str], directory: Path) -> None:
    """Train SentencePiece so that nothing is lost: every text decodes to itself.

    Identity normalization, no dummy prefix, byte fallback for characters outside the vocabulary; runs of
    spaces become pieces, which is what indented code needs.

    Raises:
        ConfigError: `tokenizer.vocab` does not suit the data.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type=config.type.value,
            vocab_size=config.vocab,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9999,
            max_sentence_length=1 << 20,
            num_threads=_THREADS,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece="</s>",
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _vocab_error(config, str(error)) from None
    directory.mkdir(parents=True)
    (directory / SENTENCEPIECE_FILE).write_bytes(model.getvalue())
    (directory / OWN_FILE).write_text(json.dumps({"type": config.type.value}) + "\n")


def _sentences(texts: list[str]) -> Iterator[str]:
    """Parts of texts without NUL (SentencePiece drops the sentence) and U+2581 (its mark of a space)."""
    for text in texts:
        for part in re.split("[\0\u2581]+", text):
            yield from (part[at : at + _SENTENCE] for at in range(0, len(part), _SENTENCE))


def _vocab_error(config: TokenizerConfig, message: str) -> ConfigError:
    where = f"tokenizer.vocab={config.vocab}"
    if most := re.search(r"value <= (\d+)", message):
        expected = f"at most {most[1]}, all that this data gives"
        fix = f"tokenizer.vocab={most[1]} or less, or more text"
        return ConfigError(where, "a vocabulary too large for the data", expected, fix)
    if least := re.search(r"required_chars\. (\d+) vs (\d+)", message):
        expected = f"at least {least[2]}: the bytes, EOD and the data's common characters"
        return ConfigError(
            where, "a vocabulary too small for the data", expected, f"tokenizer.vocab={least[2]} or more"
        )
    return ConfigError(where, f"an error of SentencePiece ({message})", "a tokenizer", "give more text")


def given_files(config: TokenizerConfig) -> dict[str, Path]:
    """The files of a given tokenizer, by the names training looks for.

    Raises:
        UserError: it is not there.
    """
    assert config.type is TokenizerType.file
    assert config.path
    path = find_tokenizer(Path(config.path).expanduser())
    name, companion = (HF_FILE, HF_CONFIG_FILE) if path.suffix == ".json" else (SENTENCEPIECE_FILE, OWN_FILE)
    files = {name: path, companion: path.with_name(companion)}
    return {name: path for name, path in files.items() if path.is_file()}


def adopt(config: TokenizerConfig, directory: Path) -> None:
    """Copy a given tokenizer into the corpus.

    Raises:
        UserError: it is not there, cannot be read, or has no end-of-document token.
    """
    files = given_files(config)
    Tokenizer.load(next(iter(files.values())))
    directory.mkdir(parents=True)
    for name, path in files.items():
        shutil.copyfile(path, directory / name)


def losses(tokenizer: Tokenizer, texts: list[str]) -> tuple[int, str]:
    """How many of `texts` do not survive encoding, and where the first one differs ("" if none)."""
    lost, example = 0, ""
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        back = tokenizer.decode(ids)
        if back != text:
            lost += 1
            example = example or _difference(text, back)
    return lost, example


def _difference(text: str, back: str) -> str:
    pairs = enumerate(zip(text, back, strict=False))
    at = next((index for index, (one, other) in pairs if one != other), min(len(text), len(back)))
    part = slice(max(0, at - 10), at + 10)
    return f"{text[part]!r} comes back as {back[part]!r}"
