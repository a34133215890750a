"""Rules of techniques: what each may be told, and what it cannot be combined with.

The refused combinations are those that would train something else than was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megafab.config.rule import Facts, Rule, Violation, below_one, not_negative, positive, table

RULES: list[Rule] = []
rule = table(RULES)

_RANGES = (
    not_negative("techniques.z_loss.weight"),
    below_one("techniques.ema.decay"),
    positive("techniques.token_dropping.steps"),
)


@rule("technique-range", relates=False)
def _ranges(facts: Facts) -> Iterator[Violation]:
    for allowed in _RANGES:
        yield from allowed.violations(facts)


# -- token dropping ------------------------------------------------------------------------------------------


@rule("token-dropping-layers")
def _token_dropping_layers(facts: Facts) -> Iterator[Violation]:
    config, layers = facts.config.techniques.token_dropping, facts.config.model.layers
    if config is None:
        return
    where = "techniques.token_dropping.layers"
    fix = f"give {where} a list of layers, from 0 to {layers - 1}"
    if config.layers is None and not config.dropping(layers):
        found = f"model.layers={layers}, of which the first and the last are kept whole"
        yield Violation(f"{where}=null", found, "a layer between them to drop tokens", fix)
    elif config.layers is not None:
        shown = f"{where}={list(config.layers)}"
        wrong = [layer for layer in config.layers if not 0 <= layer < layers]
        if not config.layers:
            yield Violation(shown, "none", "a layer to drop tokens", f"{fix}; or leave the technique out")
        elif wrong:
            found = ", ".join(f"layer {layer}" for layer in wrong)
            yield Violation(shown, found, f"layers of a model of model.layers={layers}", fix)
        elif len(set(config.layers)) < len(config.layers):
            yield Violation(shown, "a layer more than once", "every layer once", fix)


@rule("token-dropping-start")
def _token_dropping_start(facts: Facts) -> Iterator[Violation]:
    config, length = facts.config.techniques.token_dropping, facts.config.model.seq_len
    if config is None:
        return
    where, unit = f"techniques.token_dropping.start={config.start}", config.round_to
    if config.start >= length:
        expected = f"less than model.seq_len={length}: nothing would be dropped"
        fix = "lower techniques.token_dropping.start, or leave the technique out"
        yield Violation(where, f"{config.start}", expected, fix)
    elif config.start % unit:
        expected = f"a multiple of techniques.token_dropping.round_to={unit}"
        fix = f"techniques.token_dropping.start={-(-config.start // unit) * unit}, or another round_to"
        yield Violation(where, f"{config.start} % {unit} = {config.start % unit}", expected, fix)


@rule("token-dropping-sequence")
def _token_dropping_sequence(facts: Facts) -> Iterator[Violation]:
    """With sequence parallelism every tensor rank brings an equal share of the kept tokens."""
    config, parallel = facts.config.techniques.token_dropping, facts.config.parallel
    if config is not None and parallel.sequence and config.round_to % parallel.tensor:
        fix = f"techniques.token_dropping.round_to={math.lcm(config.round_to, parallel.tensor)}"
        expected = f"a multiple of parallel.tensor={parallel.tensor}, over which parallel.sequence splits"
        where = f"techniques.token_dropping.round_to={config.round_to}"
        yield Violation(where, f"{config.round_to}", expected, f"{fix}, or parallel.sequence=false")


@rule("token-dropping-context")
def _token_dropping_context(facts: Facts) -> Iterator[Violation]:
    context = facts.config.parallel.context
    if facts.config.techniques.token_dropping is not None and context > 1:
        yield Violation(
            "technique.token_dropping",
            f"parallel.context={context}",
            "whole sequences on a rank: which tokens are kept would leave context ranks with unequal parts",
            "parallel.context=1, or leave token_dropping out",
        )


@rule("token-dropping-experts")
def _token_dropping_experts(facts: Facts) -> Iterator[Violation]:
    experts = facts.config.model.moe.experts
    if facts.config.techniques.token_dropping is not None and experts:
        yield Violation(
            "technique.token_dropping",
            f"model.moe.experts={experts}",
            "a model without experts: their load would be balanced over the kept tokens alone",
            "model.moe.experts=0, or leave token_dropping out",
        )
