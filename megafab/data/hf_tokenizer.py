"""A corpus' tokenizer as `transformers` loads it: `tokenizer.json` and `tokenizer_config.json`.

SentencePiece models that `megafab data` trained are written out as a `tokenizer.json` that computes the same,
which is tried on text before it is trusted. Two things differ by nature: there, a text that spells the
end-of-document token means it, and U+2581 is a space.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megafab.data.tokenizer import HF_CONFIG_FILE, HF_FILE, OWN_FILE, SENTENCEPIECE_FILE, Tokenizer

_SPACE = "\u2581"


def export(source: Path, to: Path, *, seq_len: int, texts: Sequence[str]) -> str:
    """Write a tokenizer's files into the directory `to`; returns one line on what was done.

    Args:
        source: a corpus' tokenizer directory.
        to: a directory.
        seq_len: longest input, for `tokenizer_config.json`.
        texts: to try a translated tokenizer on.
    """
    for path in sorted(source.iterdir()):
        if path.name != OWN_FILE:
            shutil.copyfile(path, to / path.name)
    tokenizer = Tokenizer.load(source)
    if (source / HF_FILE).is_file():
        if not (to / HF_CONFIG_FILE).exists():
            content = json.loads((source / HF_FILE).read_text())
            added = {entry["id"]: entry["content"] for entry in content["added_tokens"]}
            vocab = {i: piece for piece, i in _vocab(content).items()}
            _write_config(to, added.get(tokenizer.eod) or vocab[tokenizer.eod], None, seq_len)
        return f"{HF_FILE} as it is"
    if not (source / OWN_FILE).is_file():
        return f"{SENTENCEPIECE_FILE} as it is; transformers makes of it what it will"
    theirs = _translate(source)
    wrong = sum(
        theirs.encode(text, add_special_tokens=False).ids != ids
        for text, ids in zip(texts, tokenizer.encode_batch(list(texts)), strict=True)
    )
    if wrong:
        return f"{SENTENCEPIECE_FILE} alone: a {HF_FILE} gave other ids on {wrong} of {len(texts)} texts"
    theirs.save(str(to / HF_FILE))
    _write_config(to, "</s>", "<unk>", seq_len)
    return f"{HF_FILE} gives the ids of {SENTENCEPIECE_FILE} on {len(texts)} texts"


def _vocab(content: dict[str, Any]) -> dict[str, int]:
    vocab = content["model"]["vocab"]
    return vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}


def _write_config(to: Path, eos: str, unknown: str | None, seq_len: int) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos,
        "eos_token": eos,
        **({"unk_token": unknown} if unknown else {}),
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": seq_len,
    }
    (to / HF_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _translate(source: Path) -> Any:
    """A `tokenizers.Tokenizer` of a SentencePiece model that `megafab data` trained."""
    import sentencepiece
    import tokenizers
    from tokenizers import AddedToken, decoders, models, normalizers

    model = sentencepiece.SentencePieceProcessor(model_file=str(source / SENTENCEPIECE_FILE))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    unknown = model.unk_id()
    if json.loads((source / OWN_FILE).read_text())["type"] == "bpe":
        vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
        plain = {
            piece: score
            for i, (piece, score) in enumerate(pieces)
            if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
        }
        core = models.BPE(
            vocab=vocab, merges=_merges(plain), unk_token=pieces[unknown][0], byte_fallback=True
        )
    else:
        core = models.Unigram(vocab=pieces, unk_id=unknown, byte_fallback=True)
    made = tokenizers.Tokenizer(core)
    made.normalizer = normalizers.Replace(" ", _SPACE)
    made.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    specials = [pieces[i][0] for i in (unknown, model.eos_id())]
    made.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in specials])
    return made


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, in the order in which SentencePiece merges: by the piece's score."""
    found = [
        (score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    found.sort(key=lambda merge: -merge[0])
    return [(left, right) for _, left, right in found]
