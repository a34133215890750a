"""Tokens per second and core of `megafab data` against SentencePiece's own batch encoding.

The same documents, from the default corpus, are tokenized in one process in two ways, in turns:

- SentencePiece: `encode` of batches of texts that are in memory already; nothing is read or written;
- megafab: the whole tokenize stage: read and parse JSONL, check, hash, encode, write and sync the ids.

The least of all rounds counts, of CPU seconds and of wall seconds. A megafab round starts without
cached words.

    python tools/bench/data_build.py [--bytes 3000000] [--rounds 3] [--type bpe] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data_pipeline.config import TokenizerConfig, TokenizerType  # noqa: E402
from data_pipeline.sources import resolve  # noqa: E402
from data_pipeline.stdlib import standard_library  # noqa: E402
from data_pipeline.tokenize import Job, tokenize_piece  # noqa: E402
from data_pipeline.tokenizer import sample, train  # noqa: E402
from megafab.data.tokenizer import SENTENCEPIECE_FILE, Tokenizer  # noqa: E402

_BATCH = 1 << 20  # characters; the batches of the tokenize stage


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=3_000_000, help="per domain of the default corpus")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--type", choices=["bpe", "unigram"], default="bpe")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data_build.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = measure(Path(directory), arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def measure(directory: Path, arguments: argparse.Namespace) -> dict:
    """Both ways in turns; returns what goes into the JSON."""
    import sentencepiece

    sources = standard_library(arguments.bytes)
    settings = TokenizerConfig(TokenizerType(arguments.type), arguments.vocab)
    train(settings, sample(sources, "text", settings.sample_bytes, True), directory / "tokenizer")
    pieces = (
        piece for entries in sources.values() for entry in entries for piece in entry.pieces("text", True)
    )
    texts = [text for piece in pieces for text in piece.documents("text") if isinstance(text, str) and text]
    path = directory / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer" / SENTENCEPIECE_FILE))
    batches = _batches(texts)
    job = Job(directory / "pieces", directory / "tokenizer", "", "text", False)
    job.directory.mkdir()

    def their_encoding() -> int:
        return sum(len(ids) for batch in batches for ids in model.encode(batch, num_threads=1))

    def tokenize_stage() -> int:
        tokenizer = Tokenizer.load(job.tokenizer)
        [source] = resolve("texts", [str(path)])
        counts = [
            tokenize_piece(job, tokenizer, f"piece-{number}", piece)
            for number, piece in enumerate(source.pieces("text", False))
        ]
        return sum(count.tokens - count.documents for count in counts)

    rounds = [(_timed(their_encoding), _timed(tokenize_stage)) for _ in range(arguments.rounds)]
    theirs, ours = zip(*rounds, strict=True)
    speed = {
        name: {
            "tokens": runs[0][0],
            "cpu_seconds": min(cpu for _, cpu, _ in runs),
            "wall_seconds": min(wall for _, _, wall in runs),
            "tokens_per_cpu_second": runs[0][0] / min(cpu for _, cpu, _ in runs),
            "tokens_per_wall_second": runs[0][0] / min(wall for _, _, wall in runs),
        }
        for name, runs in (("sentencepiece", theirs), ("megafab", ours))
    }
    return {
        "tokenizer": f"{arguments.type}, {arguments.vocab} ids",
        "documents": len(texts),
        "text_bytes": sum(len(text.encode()) for text in texts),
        "rounds": arguments.rounds,
        "threads": 1,
        "python": platform.python_version(),
        "sentencepiece": sentencepiece.__version__,
        **{f"{name}_speed": numbers for name, numbers in speed.items()},
        "ratio": _ratio(speed, "tokens_per_cpu_second"),
        "ratio_wall": _ratio(speed, "tokens_per_wall_second"),
    }


def _ratio(speed: dict, key: str) -> float:
    return round(speed["megafab"][key] / speed["sentencepiece"][key], 3)


def _timed(work: Callable[[], int]) -> tuple[int, float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    tokens = work()
    return tokens, time.process_time() - cpu, time.perf_counter() - wall


def _batches(texts: list[str]) -> list[list[str]]:
    batches: list[list[str]] = [[]]
    size = 0
    for text in texts:
        if size >= _BATCH:
            batches.append([])
            size = 0
        batches[-1].append(text)
        size += len(text)
    return batches


if __name__ == "__main__":
    main()
