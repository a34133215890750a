"""`megafab generate`: text from a checkpoint, to look at."""

from __future__ import annotations

from pathlib import Path

from launch.output import write
from megafab.config import load
from megafab.config.generate import GenerateConfig, check
from megafab.errors import ConfigError


def main(overrides: list[str]) -> int:
    """Print samples and keep them beside the run; returns the exit code."""
    config = load.compose(GenerateConfig, "generate", overrides)
    check(config)
    from launch.chosen import chosen
    from megafab.data.tokenizer import Tokenizer
    from megafab.platform import platform

    checkpoint, run, corpus = chosen(config.checkpoint, config.data)
    if config.retrieval and not run.model.retro.chunk:
        found, expected = "a model that looks at no neighbours", "model.retro.chunk in its run"
        raise ConfigError("retrieval=true", found, expected, "leave retrieval out")
    platform.start(0)
    import torch

    from megafab import retrieval
    from megafab.generate import load_model, sample
    from megafab.topology.groups import shutdown

    model = load_model(run, checkpoint, corpus.vocab_size)
    tokenizer = Tokenizer.load(corpus.tokenizer_dir)
    prompt = tokenizer.encode(config.prompt) or [corpus.eod]
    settings = {k: getattr(config, k) for k in ("tokens", "temperature", "top_k")}
    settings.update(vocab=corpus.vocab_size, eod=corpus.eod)
    generator = torch.Generator().manual_seed(config.seed)
    source = None if config.retrieval is False else retrieval.of(run, corpus)
    texts = []
    for _ in range(config.samples):
        live = source and retrieval.LiveRetrieval(source, run.model.seq_len, prompt)
        ids = sample(model, prompt, generator=generator, live=live, **settings)
        texts.append(config.prompt + tokenizer.decode(ids))
    shutdown()
    print(f"{checkpoint}, temperature {config.temperature}:\n", *texts, sep="\n")
    out = Path(config.out) if config.out else checkpoint.parent.parent / "sample.txt"
    write(out, "\n\n".join(texts) + "\n")
    return 0
