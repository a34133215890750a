"""Tokenizers: nothing is lost, nothing differs from the library's own encoding, byte counts are right."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from hf_tokenizer import byte_level_bpe

from data_pipeline.config import TokenizerConfig, TokenizerType
from data_pipeline.tokenizer import train
from megafab.data.tokenizer import SENTENCEPIECE_FILE, Tokenizer, tokenizer_fingerprint
from megafab.errors import UserError

SOURCE = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text()
PROSE = "Le café d’été, où l'on mange des crêpes: 12.50 EUR. Съешь ещё этих мягких булок. 日本語の文。\n" * 20

NASTY = {
    "empty": "",
    "one space": " ",
    "spaces": "   a    b     ",
    "tabs": "\ta\t\tb\n\t\tc\t",
    "CRLF": "a\r\nb\r\r\n\n\rc",
    "NUL": "a\0b\0\0",
    "U+2581": "\u2581a\u2581\u2581 \u2581b \u2581",
    "only U+2581": "\u2581",
    "controls": "".join(map(chr, range(32))) + "\x7f\x85\u2028\u2029",
    "spaces of Unicode": "a\u00a0b\u3000c\u200bd\ufeffe",
    "combining": "e\u0301 n\u0303o\u0308 \u0915\u094d\u0937",
    "not normalized": "\ufb01 \u212b \u00c5 A\u030a \uff21",
    "emoji": "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "ends of planes": "\ufffd\ufffe\uffff\U00010000\U0010ffff\ue000",
    "spelled specials": "</s> <unk> <0x41> <|endoftext|> \u2047",
    "long line": "x" * 30_000 + " " * 3000 + "y z" * 5000,
    "longer than a slice": ("def f(x):  return x\n" * 60_000) + "z" * 1_100_000,
    "code": SOURCE,
    "prose": PROSE,
}


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "tokenizer"
    train(TokenizerConfig(TokenizerType(request.param), vocab=700), [SOURCE, PROSE], path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


@pytest.mark.parametrize("name", NASTY)
def test_every_text_decodes_to_itself(tokenizer: Tokenizer, name: str) -> None:
    text = NASTY[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod not in ids
    assert int(tokenizer.byte_lengths()[ids].sum()) == len(text.encode())


def test_a_batch_equals_its_texts_one_by_one(tokenizer: Tokenizer) -> None:
    texts = list(NASTY.values())
    one_by_one = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == one_by_one
    assert [ids.tolist() for ids in tokenizer.encode_arrays(texts)] == one_by_one


@pytest.mark.parametrize(
    ("sample", "vocab"),
    [(SOURCE, 800), (PROSE, 400), ("e\u0301te\u0301 cafe\u0301s de\u0301ja\u0300 vu.\n" * 50, 300)],
    ids=["code", "prose", "combining marks join letters"],
)
def test_words_from_the_cache_change_no_token(sample: str, vocab: int, tmp_path: Path) -> None:
    train(TokenizerConfig(TokenizerType.bpe, vocab=vocab), [sample], tmp_path / "tokenizer")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    library = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "tokenizer" / SENTENCEPIECE_FILE)
    )
    texts = [text for text in [sample, *NASTY.values()] if "\u2581" not in text and len(text) < 200_000]
    for _ in range(2):  # the second time from the cache
        assert tokenizer.encode_batch(texts) == library.encode(texts)


def test_runs_of_spaces_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("        ")) <= 2


def test_decode_leaves_out_the_end_of_document(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab")
    assert tokenizer.decode([*ids, tokenizer.eod]) == "ab"
    assert tokenizer.byte_lengths()[tokenizer.eod] == 0


def test_fingerprint_is_that_of_the_content(directory: Path, tmp_path: Path) -> None:
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert tokenizer_fingerprint(tmp_path) == tokenizer_fingerprint(directory)
    (tmp_path / SENTENCEPIECE_FILE).write_bytes(b"other")
    assert tokenizer_fingerprint(tmp_path) != tokenizer_fingerprint(directory)


@pytest.mark.parametrize("name", [name for name in NASTY if name != "longer than a slice"])
def test_hugging_face_byte_level(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "tokenizer.json"
    if not path.exists():
        byte_level_bpe(path, ["<pad>", "<|endoftext|>"])
    tokenizer = Tokenizer.load(path)
    assert tokenizer.eod == 1
    text = NASTY[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod not in ids  # even where the text spells it
    assert int(tokenizer.byte_lengths()[ids].sum()) == len(text.encode())


def test_hugging_face_names_its_end_of_document(tmp_path: Path) -> None:
    byte_level_bpe(tmp_path / "tokenizer.json", ["<|endoftext|>", "<|stop|>"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|stop|>"}}))
    assert Tokenizer.load(tmp_path).eod == 1


def test_no_end_of_document(tmp_path: Path) -> None:
    byte_level_bpe(tmp_path / "tokenizer.json", ["<pad>"])
    with pytest.raises(UserError, match=r"tokenizer\.json: found no end-of-document token.*<\|endoftext\|>"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_file_that_is_no_tokenizer(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=rf"{name}: found a file that cannot be read") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_tokenizer_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a directory without a tokenizer.*tokenizer\.model"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="no such file or directory"):
        Tokenizer.load(tmp_path / "missing")
