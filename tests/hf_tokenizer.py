"""A Hugging Face tokenizer for tests: byte-level BPE, like that of GPT-2."""

from __future__ import annotations

from pathlib import Path

import tokenizers


def byte_level_bpe(path: Path, specials: list[str]) -> Path:
    """Train a small one on this file and write it as `tokenizer.json` content to `path`."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([Path(__file__).read_text()], trainer)
    model.save(str(path))
    return path
