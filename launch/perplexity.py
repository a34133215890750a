"""`megafab perplexity`: the loss of a checkpoint on held-out text, and what its neighbours are worth."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch.output import write
from megafab.config import load
from megafab.config.perplexity import PerplexityConfig, check
from megafab.errors import ConfigError

if TYPE_CHECKING:
    from megafab.perplexity import Domain


def main(overrides: list[str]) -> int:
    """Print the table and keep the numbers; returns the exit code."""
    config = load.compose(PerplexityConfig, "perplexity", overrides)
    check(config)
    from launch.chosen import chosen
    from megafab.platform import platform

    checkpoint, run, corpus = chosen(config.checkpoint, config.data)
    if config.retrieval is not None:
        if not run.model.retro.chunk:
            found, expected = "a model that looks at no neighbours", "model.retro.chunk in its run"
            raise ConfigError(f"retrieval={config.retrieval}", found, expected, "leave retrieval out")
        run = replace(run, data=replace(run.data, retrieval=config.retrieval))
    if not sum(corpus.tokens("valid")):
        fix = "data=DIR, a corpus built with valid_fraction"
        raise ConfigError(f"data={corpus.path}", "no held-out text", "a validation split", fix)
    platform.start(0)
    from megafab.perplexity import measure
    from megafab.topology.groups import shutdown

    found = measure(run, checkpoint, corpus, samples=config.samples, micro_batch=config.micro_batch)
    shutdown()
    numbers = {"checkpoint": str(checkpoint), "domains": {name: one.rows for name, one in found.items()}}
    out = Path(config.out) if config.out else checkpoint.parent.parent / "perplexity.json"
    write(out, json.dumps(numbers, indent=1) + "\n")
    print(f"{checkpoint}, {corpus.path}, at most {config.samples} sequences a domain, nats a token:\n")
    print("\n".join(_table(found)))
    return 0


def _table(found: Mapping[str, Domain]) -> Iterator[str]:
    from megafab.perplexity import MODES, perplexity

    modes = [mode for mode in MODES if any(mode in domain.modes for domain in found.values())]
    names = {"on": "neighbours", "off": "none" if len(modes) > 1 else "loss", "wrong": "wrong ones"}
    heads = [names[mode] for mode in modes] + [f"perplexity, {names[mode]}" for mode in modes]
    wide = max(map(len, (*found, "domain")))
    yield f"{'domain':<{wide}}  {'tokens':>10}" + "".join(f"  {head:>{max(10, len(head))}}" for head in heads)
    for name, domain in found.items():
        losses = [domain.modes[mode].loss for mode in modes]
        cells = [f"{loss:.4f}" if loss is not None else "-" for loss in losses] + [*map(perplexity, losses)]
        yield f"{name:<{wide}}  {domain.modes['off'].tokens:>10,}" + "".join(
            f"  {cell:>{max(10, len(head))}}" for cell, head in zip(cells, heads, strict=True)
        )
    if len(modes) == 1:
        return
    yield "\nchunks by the longest run of tokens that a neighbour shares with them, of all their tokens:"
    for name, domain in found.items():
        for row in domain.rows["overlap"]:
            if not row["tokens"]:
                continue
            share = row["tokens"] / domain.modes["off"].tokens
            losses = ", ".join(f"{names[mode]} {row[mode]:.4f}" for mode in ("on", "off"))
            yield f"{name:<{wide}}  at most {row['at_most']:.1%}: {share:.1%} of the tokens; {losses}"
