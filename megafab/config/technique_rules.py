"""Rules of techniques: what each may be told, and what it cannot be combined with.

The refused combinations are those that would train something else than was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

from megafab.config.rule import Facts, Rule, Violation, below_one, not_negative, table

RULES: list[Rule] = []
rule = table(RULES)

_RANGES = (
    not_negative("techniques.z_loss.weight"),
    below_one("techniques.ema.decay"),
)


@rule("technique-range", relates=False)
def _ranges(facts: Facts) -> Iterator[Violation]:
    for allowed in _RANGES:
        yield from allowed.violations(facts)
