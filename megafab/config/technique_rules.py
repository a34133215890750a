"""Rules of techniques: what each may be told, and what it cannot be combined with.

The refused combinations are those that would train something else than was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from megafab.config.rule import Facts, Rule, Violation, below_one, not_negative, positive, table, value_at
from megafab.data.derived import DIFFICULTY
from megafab.errors import UserError
from megafab.function import FORM, is_named
from megafab.techniques.config import DifficultyKind, PacingConfig, PacingShape

RULES: list[Rule] = []
rule = table(RULES)

_PACED = ("techniques.curriculum.pacing", "techniques.sequence_curriculum.pacing")

_RANGES = (
    not_negative("techniques.z_loss.weight"),
    below_one("techniques.ema.decay"),
    *(positive(f"{name}.{key}") for name in _PACED for key in ("degree", "round_to")),
)


@rule("technique-range", relates=False)
def _ranges(facts: Facts) -> Iterator[Violation]:
    for allowed in _RANGES:
        yield from allowed.violations(facts)


# -- pacing, of every curriculum -----------------------------------------------------------------------------

_PACING_KEYS = {
    PacingShape.linear: ("start", "end", "steps"),
    PacingShape.root: ("start", "end", "steps", "degree"),
    PacingShape.step: ("levels", "last_steps"),
    PacingShape.custom: ("start", "end", "function"),
}


def _pacings(facts: Facts) -> Iterator[tuple[str, PacingConfig]]:
    """Each pacing of the run, and its key."""
    for key in _PACED:
        pacing = value_at(facts.config, key)
        if pacing is not None:
            yield key, pacing


def _ends(key: str, pacing: PacingConfig) -> list[tuple[str, float]]:
    """The difficulties that a pacing is given, by their keys."""
    if pacing.shape is PacingShape.step:
        return [(f"{key}.levels", level) for level in pacing.levels or ()]
    given = ((f"{key}.start", pacing.start), (f"{key}.end", pacing.end))
    return [(name, value) for name, value in given if value is not None]


@rule("pacing-keys", relates=False)
def _pacing_keys(facts: Facts) -> Iterator[Violation]:
    for key, pacing in _pacings(facts):
        takes = _PACING_KEYS[pacing.shape]
        for name in ("start", "end", "steps", "degree", "levels", "last_steps", "function"):
            given = value_at(pacing, name)
            where, shape = f"{key}.{name}", f"{key}.shape={pacing.shape.name}"
            if given is None and name in takes:
                yield Violation(where, "nothing", f"a value, for {shape}", f"give {where} a value")
            elif given is not None and name not in takes:
                other = next(shape.name for shape, names in _PACING_KEYS.items() if name in names)
                fix = f"{where}=null, or {key}.shape={other}"
                yield Violation(where, shape, f"no value: it takes {', '.join(takes)}", fix)
        if pacing.shape is PacingShape.step and pacing.round_to != 1:
            fix = f"leave {key}.round_to out"
            yield Violation(
                f"{key}.round_to={pacing.round_to:g}", f"{key}.shape=step", "levels as they are", fix
            )


@rule("pacing", relates=False)
def _pacing(facts: Facts) -> Iterator[Violation]:
    for key, pacing in _pacings(facts):
        if pacing.steps is not None and pacing.steps < 1:
            yield Violation(
                f"{key}.steps={pacing.steps}", f"{pacing.steps}", "at least 1", f"{key}.steps=1000"
            )
        if pacing.function is not None and not is_named(pacing.function):
            found, fix = "no name of a function", f"name it as {FORM}"
            yield Violation(f"{key}.function={pacing.function}", found, FORM, fix)
        ends = _ends(key, pacing)
        for name, value in ends:
            if not math.isfinite(value):
                yield Violation(f"{name}={value:g}", f"{value:g}", "a number", f"give {name} numbers")
        for (name, low), (_, high) in pairwise(ends):
            if math.isfinite(low) and low > high:
                found, fix = f"{high:g} after it", "give them from the easiest to the hardest"
                yield Violation(f"{name}={low:g}", found, "no less: a difficulty never falls", fix)
        if pacing.levels is not None and pacing.last_steps is not None:
            yield from _level_steps(key, pacing.levels, pacing.last_steps)


def _level_steps(key: str, levels: tuple[float, ...], last_steps: tuple[int, ...]) -> Iterator[Violation]:
    where = f"{key}.last_steps={list(last_steps)}"
    if len(last_steps) != len(levels) - 1:
        found, expected = f"{len(last_steps)} for {len(levels)} levels", "one for each level but the last"
        yield Violation(where, found, expected, f"give {key}.levels one entry more than {key}.last_steps")
    if any(low >= high for low, high in pairwise((0, *last_steps))):
        yield Violation(where, f"{list(last_steps)}", "growing numbers from 1 on", "give them in order")


# -- curricula -----------------------------------------------------------------------------------------------


@rule("curriculum-percent", relates=False)
def _curriculum_percent(facts: Facts) -> Iterator[Violation]:
    curriculum = facts.config.techniques.curriculum
    if curriculum is None or curriculum.kind is not DifficultyKind.percentile:
        return
    for name, value in _ends("techniques.curriculum.pacing", curriculum.pacing):
        if math.isfinite(value) and not 0 < value <= 100:
            fix = "give percent, or techniques.curriculum.kind=threshold"
            yield Violation(f"{name}={value:g}", f"{value:g}", "more than 0 and at most 100 percent", fix)


@rule("curriculum-index")
def _curriculum_index(facts: Facts) -> Iterator[Violation]:
    """The manifest only: its files are looked at when the run is built."""
    curriculum, corpus, length = facts.config.techniques.curriculum, facts.data, facts.config.model.seq_len
    if curriculum is None or corpus is None:
        return
    where = f"techniques.curriculum.difficulty={curriculum.difficulty}"
    fix = f"make one: megafab data difficulty path={corpus.path} seq_len={length} metric=rarity"
    try:
        directory = DIFFICULTY.directory(Path(corpus.path), curriculum.difficulty)
        manifest = DIFFICULTY.read(directory)
        DIFFICULTY.require_corpus(directory, manifest, corpus.fingerprint)
    except UserError as error:
        yield Violation(where, f"{error.found} ({error.where})", error.expected, fix)
        return
    if manifest["seq_len"] != length:
        found = f"windows of {manifest['seq_len']} tokens"
        yield Violation(where, found, f"windows of model.seq_len={length}", fix)


@rule("sequence-curriculum-length")
def _sequence_curriculum_length(facts: Facts) -> Iterator[Violation]:
    curriculum, key = facts.config.techniques.sequence_curriculum, "techniques.sequence_curriculum.pacing"
    if curriculum is None:
        return
    longest, (unit, axes) = facts.config.model.seq_len, facts.sequence_unit
    split = f" that is a multiple of {unit}, to be split over {axes}" if unit > 1 else ""
    for name, value in [*_ends(key, curriculum.pacing), (f"{key}.round_to", curriculum.pacing.round_to)]:
        if curriculum.pacing.shape is PacingShape.step and name.endswith("round_to"):
            continue  # there it is 1, and nothing is rounded
        if not math.isfinite(value):
            continue  # reported by `pacing` or `technique-range`
        if value < 1 or value > longest or value % unit:
            expected = f"a whole number from 1 to model.seq_len={longest}{split}"
            fix = f"give {name} such a number"
            yield Violation(f"{name}={value:g}", f"{value:g}", expected, fix)
