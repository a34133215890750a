"""`megafab generate`: text from a checkpoint, to look at."""

from __future__ import annotations

import sys
from pathlib import Path

from megafab.config import load
from megafab.config.generate import GenerateConfig, check
from megafab.errors import ConfigError, UserError


def main(overrides: list[str]) -> int:
    """Print samples and keep them beside the run; returns the exit code."""
    config = load.compose(GenerateConfig, "generate", overrides)
    check(config)
    from megafab.checkpoint import store
    from megafab.config.schema import RunConfig
    from megafab.config.tree import build
    from megafab.data.format import Corpus
    from megafab.data.tokenizer import Tokenizer
    from megafab.platform import platform

    paths = store.locate(Path(config.checkpoint), key="checkpoint")
    checkpoint, damaged = store.first_intact(paths, store.quick_check)
    assert checkpoint is not None  # locate() has refused a place without any
    for problem in damaged:
        print(f"passing over a damaged checkpoint: {problem}", file=sys.stderr)
    state = store.read_state(checkpoint)
    run = build(RunConfig, state["config"])
    corpus = Corpus.open(config.data or run.data.path)
    if corpus.tokenizer_fingerprint != state["data"].get("tokenizer", corpus.tokenizer_fingerprint):
        raise ConfigError(
            f"data={config.data or run.data.path}",
            "another tokenizer than the checkpoint was trained with",
            "the corpus of the run",
            "name the corpus directory of the run with data=",
        )
    platform.start(0)
    import torch

    from megafab.generate import load_model, sample
    from megafab.topology.groups import shutdown

    model = load_model(run, checkpoint, corpus.vocab_size)
    tokenizer = Tokenizer.load(corpus.tokenizer_dir)
    prompt = tokenizer.encode(config.prompt) or [corpus.eod]
    settings = {k: getattr(config, k) for k in ("tokens", "temperature", "top_k")}
    settings.update(vocab=corpus.vocab_size, eod=corpus.eod)
    generator = torch.Generator().manual_seed(config.seed)
    texts = [
        config.prompt + tokenizer.decode(sample(model, prompt, generator=generator, **settings))
        for _ in range(config.samples)
    ]
    shutdown()
    print(f"{checkpoint}, temperature {config.temperature}:\n", *texts, sep="\n")
    _write(Path(config.out) if config.out else checkpoint.parent.parent / "sample.txt", texts)
    return 0


def _write(path: Path, texts: list[str]) -> None:
    try:
        path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    except OSError as error:
        found = error.strerror or type(error).__name__
        raise UserError(f"out={path}", found, "a file to write", "choose another out=") from error
