"""Rules of techniques: what each may be told, and what it cannot be combined with.

The refused combinations are those that would train something else than was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from itertools import pairwise
from pathlib import Path

from megafab.checkpoint.changes import shown
from megafab.config.rule import (
    Facts,
    Range,
    Rule,
    Violation,
    below_one,
    not_negative,
    positive,
    table,
    value_at,
)
from megafab.config.tree import did_you_mean
from megafab.data.derived import DIFFICULTY, SCORES
from megafab.errors import UserError
from megafab.function import FORM, is_named
from megafab.model.names import matches, parameter_shapes
from megafab.optim.config import WHOLE_MATRICES
from megafab.techniques.config import (
    DifficultyKind,
    MixingMode,
    PacingConfig,
    PacingShape,
    Population,
    Reward,
    SparsityPattern,
)

RULES: list[Rule] = []
rule = table(RULES)

_PACED = ("techniques.curriculum.pacing", "techniques.sequence_curriculum.pacing")


def _inside(key: str) -> Range:
    return Range(key, 0, 1, "more than 0 and below 1", open_low=True, open_high=True)


_RANGES = (
    not_negative("techniques.z_loss.weight"),
    below_one("techniques.label_smoothing.epsilon"),
    below_one("techniques.ema.decay"),
    below_one("techniques.online_mixing.smoothing"),
    not_negative("techniques.online_mixing.warmup_steps"),
    positive("techniques.online_mixing.every"),
    positive("techniques.online_mixing.reward_scale"),
    below_one("techniques.online_mixing.exploration_floor"),
    Range("techniques.online_mixing.max_loss", 0, 100, "more than 0 and at most 100", open_low=True),
    below_one("techniques.dynamic_loading.smoothing"),
    not_negative("techniques.replay.seed"),
    _inside("techniques.replay.share"),
    positive("techniques.sample_reweighting.temperature"),
    positive("techniques.sample_reweighting.start_temperature"),
    not_negative("techniques.sample_reweighting.warmup_steps"),
    not_negative("techniques.sample_reweighting.temperature_steps"),
    Range("techniques.sample_reweighting.quantile", 0, 0.5, "at least 0 and below 0.5", open_high=True),
    Range("techniques.token_selection.keep", 0, 1, "more than 0 and at most 1", open_low=True),
    not_negative("techniques.token_selection.warmup_steps"),
    positive("techniques.token_dropping.steps"),
    *(_inside(f"techniques.{name}.sparsity") for name in ("static_sparsity", "gradual_pruning")),
    not_negative("techniques.static_sparsity.seed"),
    below_one("techniques.gradual_pruning.begin"),
    _inside("techniques.gradual_pruning.end"),
    *(positive(f"{name}.{key}") for name in _PACED for key in ("degree", "round_to")),
)


@rule("technique-range", relates=False)
def _ranges(facts: Facts) -> Iterator[Violation]:
    for allowed in _RANGES:
        yield from allowed.violations(facts)


# -- the mixture ---------------------------------------------------------------------------------------------


@rule("one-mixing-policy", relates=False)
def _one_mixing_policy(facts: Facts) -> Iterator[Violation]:
    on = facts.config.techniques
    if on.online_mixing and on.dynamic_loading:
        expected, fix = "one technique that decides the mixture", "take one of the two out"
        where = "technique=[online_mixing,dynamic_loading]"
        yield Violation(where, "two that decide the mixture", expected, fix)


# They change which tokens a layer computes, or which weights it has.
_NOT_WITH_NEIGHBORS = ("token_dropping", "sequence_curriculum", "static_sparsity", "gradual_pruning")


@rule("techniques-with-retro", relates=False)
def _techniques_with_retro(facts: Facts) -> Iterator[Violation]:
    chunk = facts.config.model.retro.chunk
    for name in _NOT_WITH_NEIGHBORS:
        if chunk and getattr(facts.config.techniques, name) is not None:
            found, expected = f"model.retro.chunk={chunk}", "a model that looks at no neighbours"
            fix = f"take {name} out, or model.retro.chunk=0"
            yield Violation(f"technique=[{name}]", found, expected, fix)
    for name in ("curriculum", "token_selection"):
        if facts.config.model.retro.in_context and getattr(facts.config.techniques, name) is not None:
            found, fix = "model.retro.in_context=true", f"take {name} out, or model.retro.in_context=false"
            expected = "rows that are windows alone, as what it reads was made for"
            yield Violation(f"technique=[{name}]", found, expected, fix)


@rule("freezing")
def _freezing(facts: Facts) -> Iterator[Violation]:
    freezing, shape = facts.config.techniques.freezing, facts.shape
    if freezing is None or shape is None:
        return
    names = parameter_shapes(shape)
    where = f"techniques.freezing.trained={shown(freezing.trained)}"
    for pattern in freezing.trained:
        if not any(matches(name, [pattern]) for name in names):
            fix = "a name from megafab ckpt inspect, with * for anything; retrieval needs model.retro.chunk"
            yield Violation(where, f"no parameter {pattern}", "patterns of names of parameters", fix)
    trained = sum(matches(name, freezing.trained) for name in names)
    if trained in (0, len(names)):
        found, fix = "nothing left to train", "give names"
        if trained:
            found, fix = "every parameter", "leave freezing out"
        yield Violation(where, found, "some that are trained and some that are not", fix)
    if facts.config.optim.name in WHOLE_MATRICES:
        found, fix = f"optim.name={facts.config.optim.name.value}", "optim=adamw"
        expected = "an optimizer of single elements: one of matrices lets all of them decay"
        yield Violation("technique=[freezing]", found, expected, fix)


def _known(facts: Facts, key: str, names: Iterable[str]) -> Iterator[Violation]:
    """Names of domains must be the corpus'."""
    for name in names:
        if facts.data and name not in facts.data.tokens:
            known = ", ".join(facts.data.tokens)
            fix = did_you_mean(name, facts.data.tokens) or "use the names of the corpus"
            yield Violation(key, name, f"domains of data.path={facts.data.path}: {known}", fix)


@rule("online-mixing", relates=False)
def _online_mixing(facts: Facts) -> Iterator[Violation]:
    mixing = facts.config.techniques.online_mixing
    if mixing is None:
        return
    key = "techniques.online_mixing"
    excess = mixing.reward is Reward.excess
    if bool(mixing.reference) != excess:
        fix = f"give {key}.reference={{domain: loss, ...}} with {key}.reward=excess, or neither"
        found = "no reference losses" if excess else "reference losses that nothing reads"
        yield Violation(f"{key}.reward={_name(mixing.reward)}", found, "both, or neither", fix)
    if excess and facts.data:
        missing = [name for name in _mixed(facts) if name not in mixing.reference]
        if missing and mixing.reference:
            fix = f"add {missing[0]} to it"
            yield Violation(f"{key}.reference", f"no loss for {', '.join(missing)}", "one a domain", fix)
    if mixing.mode is MixingMode.released and mixing.reward_scale != 1.0:
        fix = f"leave {key}.reward_scale out, or {key}.mode=paper"
        expected = "1, since only the shares of rewards count there"
        yield Violation(f"{key}.reward_scale={mixing.reward_scale:g}", f"{key}.mode=released", expected, fix)
    count = len(_mixed(facts))
    if count and mixing.exploration_floor * count >= 1:
        fix, expected = f"{key}.exploration_floor=0", f"less than 1 over the {count} domains that are mixed"
        where = f"{key}.exploration_floor={mixing.exploration_floor:g}"
        yield Violation(where, f"{mixing.exploration_floor:g}", expected, fix)
    yield from _known(facts, f"{key}.reference", mixing.reference)
    yield from _losses(f"{key}.reference", mixing.reference)


@rule("dynamic-loading", relates=False)
def _dynamic_loading(facts: Facts) -> Iterator[Violation]:
    loading, evaluation = facts.config.techniques.dynamic_loading, facts.config.eval
    if loading is None:
        return
    key = "techniques.dynamic_loading"
    if not evaluation.every or not evaluation.samples:
        found = f"eval.every={evaluation.every} eval.samples={evaluation.samples}"
        expected = "evaluations, after each of which the mixture is decided"
        yield Violation("technique=[dynamic_loading]", found, expected, "eval.every=400 eval.samples=64")
    if bool(loading.fit_losses) != bool(loading.fit_sizes):
        expected, fix = "both, or neither", "three sizes, and three losses for each domain"
        given, missing = ("fit_losses", "fit_sizes") if loading.fit_losses else ("fit_sizes", "fit_losses")
        yield Violation(f"{key}.{given}", f"no {key}.{missing}", expected, fix)
    twice = loading.reference.keys() & loading.fit_losses.keys()
    if twice:
        where, fix = f"{key}.reference", "give each domain one of the two"
        yield Violation(where, f"{', '.join(sorted(twice))} in fit_losses too", "one for each domain", fix)
    if facts.data and facts.data.valid_tokens is not None:
        missing = [name for name in _mixed(facts) if not facts.data.valid_tokens.get(name)]
        if missing and any(facts.data.valid_tokens.values()):
            fix = "build the corpus with a larger valid_fraction, or leave them out of data.mixture"
            found = f"no validation text in {', '.join(missing)}"
            yield Violation(f"data.path={facts.data.path}", found, "some in each domain that is mixed", fix)
    yield from _known(facts, f"{key}.reference", loading.reference)
    yield from _known(facts, f"{key}.fit_losses", loading.fit_losses)
    yield from _losses(f"{key}.reference", loading.reference)


def _losses(key: str, losses: Mapping[str, float]) -> Iterator[Violation]:
    for name, loss in losses.items():
        if not 0 <= loss < math.inf:
            where, fix = f"{key}.{name}={loss:g}", "give the loss of a model in nats a token"
            yield Violation(where, f"{loss:g}", "0 or more", fix)


@rule("technique-length")
def _technique_length(facts: Facts) -> Iterator[Violation]:
    """What begins after the end of the run never acts."""
    total, on = facts.total_steps, facts.config.techniques
    if total is None:
        return
    names = ("online_mixing", "sample_reweighting", "token_selection")
    keys = [f"techniques.{name}.warmup_steps" for name in names]
    if on.online_mixing is not None:
        keys.append("techniques.online_mixing.every")
    if on.dynamic_loading is not None:
        keys.append("eval.every")
    for key in keys:
        value = value_at(facts.config, key)
        if value is not None and value >= total:
            expected = f"less than the {total} steps of the run, for the technique to act"
            yield Violation(
                f"{key}={value}", f"{value}", expected, f"{key}={max(1, total // 50)}, for example"
            )


@rule("replay", relates=False)
def _replay(facts: Facts) -> Iterator[Violation]:
    replay = facts.config.techniques.replay
    if replay is None:
        return
    key, corpus = "techniques.replay.domains", facts.data
    if not replay.domains:
        yield Violation(f"{key}=[]", "no domain", "the domains of the earlier training", f"{key}=[name]")
    yield from _known(facts, key, replay.domains)
    if len(set(replay.domains)) < len(replay.domains):
        where = f"{key}=[{', '.join(replay.domains)}]"
        yield Violation(where, "a domain more than once", "each once", "leave out what is double")
    if corpus and replay.domains and all(name in corpus.tokens for name in replay.domains):
        weights = _weights(facts)
        old = [name for name in replay.domains if weights.get(name, 0) > 0]
        new = [name for name, weight in weights.items() if weight > 0 and name not in replay.domains]
        if not old or not new:
            found = f"no weight for {'any of them' if not old else 'any other domain'} in data.mixture"
            fix = "give both a weight in data.mixture; only its proportions inside each group count"
            where = f"{key}=[{', '.join(replay.domains)}]"
            yield Violation(where, found, "old domains and new ones, both with a weight", fix)


def _weights(facts: Facts) -> Mapping[str, float]:
    mixture, corpus = facts.config.data.mixture, facts.data
    return mixture if mixture is not None else corpus.tokens if corpus else {}


def _mixed(facts: Facts) -> list[str]:
    """The domains that a mixing policy decides over."""
    replay = facts.config.techniques.replay
    fixed = replay.domains if replay else []
    return [name for name, weight in _weights(facts).items() if weight > 0 and name not in fixed]


def _name(value: Enum | None) -> str:
    return "null" if value is None else str(value.value)


# -- the loss ------------------------------------------------------------------------------------------------


@rule("sample-reweighting")
def _sample_reweighting(facts: Facts) -> Iterator[Violation]:
    weighing, train = facts.config.techniques.sample_reweighting, facts.config.train
    if weighing is None:
        return
    key = "techniques.sample_reweighting"
    by_micro_batch = weighing.over is Population.micro_batch
    samples = train.micro_batch * facts.data_ranks if by_micro_batch else train.global_batch
    if samples < 2:
        found = f"train.micro_batch={train.micro_batch} on {facts.data_ranks} data parallel rank"
        expected = "at least 2 samples that are weighed together; one alone always counts as it is"
        fix = f"a larger train.micro_batch, or {key}.over=batch"
        if not by_micro_batch:
            found, fix = f"train.global_batch={train.global_batch}", "a larger train.global_batch"
        yield Violation(f"{key}.over={weighing.over.value}", found, expected, fix)
    if bool(weighing.temperature_steps) != (weighing.start_temperature is not None):
        where = f"{key}.temperature_steps={weighing.temperature_steps}"
        found = f"{key}.start_temperature={weighing.start_temperature}"
        fix = "give both to move the temperature, or neither"
        yield Violation(where, found, "both, or neither", fix)


@rule("token-selection", relates=False)
def _token_selection(facts: Facts) -> Iterator[Violation]:
    selection, corpus = facts.config.techniques.token_selection, facts.data
    if selection is None or corpus is None:
        return
    try:
        directory = SCORES.directory(Path(corpus.path), selection.reference)
        manifest = SCORES.read(directory)
        if corpus.fingerprint:
            SCORES.require_corpus(directory, manifest, corpus.fingerprint)
        if manifest["packing"] != facts.config.data.packing.value:
            found, fix = f"data.packing={facts.config.data.packing.value}", "score again with that packing"
            where = f"techniques.token_selection.reference={selection.reference}"
            yield Violation(where, found, f"{manifest['packing']}, as the reference was run with", fix)
    except UserError as error:
        where = f"techniques.token_selection.reference={selection.reference}"
        yield Violation(where, f"{error.found} at {error.where}", error.expected, error.fix)


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


# -- sparsity ------------------------------------------------------------------------------------------------


@rule("one-sparsity", relates=False)
def _one_sparsity(facts: Facts) -> Iterator[Violation]:
    on = facts.config.techniques
    if on.static_sparsity and on.gradual_pruning:
        where = "technique=[static_sparsity,gradual_pruning]"
        expected, fix = "one technique that decides which weights are 0", "take one of the two out"
        yield Violation(where, "two that mask weights", expected, fix)


@rule("two-four")
def _two_four(facts: Facts) -> Iterator[Violation]:
    """In every group of four inputs of an output two are masked, so inputs come in fours."""
    sparsity, shape = facts.config.techniques.static_sparsity, facts.shape
    if sparsity is None or sparsity.pattern is not SparsityPattern.two_four:
        return
    pattern = "techniques.static_sparsity.pattern=two_four"
    if sparsity.share != 0.5:
        key = "techniques.static_sparsity.sparsity"
        fix = f"{key}=null, or techniques.static_sparsity.pattern=unstructured"
        yield Violation(f"{key}={sparsity.share:g}", pattern, "0.5, which is two of four", fix)
    if shape is None:
        return
    model, layers = facts.config.model, range(facts.config.model.layers)
    inputs = {"model.hidden": model.hidden, "model.heads x model.head_dim": model.heads * shape.head_dim}
    if not all(shape.is_moe_layer(layer) for layer in layers):
        inputs["model.ffn"] = shape.ffn
    if model.moe.experts:
        inputs |= {"model.moe.ffn": shape.expert_ffn, "model.moe.shared_ffn": model.moe.shared_ffn}
    for key, width in inputs.items():
        if width % 4:
            fix = f"change {key}, or techniques.static_sparsity.pattern=unstructured"
            expected = f"groups of 4, for {pattern}"
            yield Violation(f"{key}={width}", f"{width} % 4 = {width % 4}", expected, fix)


@rule("gradual-pruning")
def _gradual_pruning(facts: Facts) -> Iterator[Violation]:
    pruning, steps = facts.config.techniques.gradual_pruning, facts.total_steps
    key = "techniques.gradual_pruning"
    if pruning is None or pruning.end >= 1:
        return
    if pruning.begin >= pruning.end:
        where = f"{key}.begin={pruning.begin:g}"
        fix = f"lower {key}.begin or raise {key}.end"
        yield Violation(where, f"{key}.end={pruning.end:g}", "a ramp that ends after it begins", fix)
    elif steps is not None and pruning.every > (1 - pruning.end) * steps:
        # A step after the ramp costs less than the mean step: there are at least as many of them.
        after = int((1 - pruning.end) * steps)
        fix = f"{key}.every={after} or less" if after else f"lower {key}.end"
        expected = f"at most {after}, the steps after the ramp: the last pruning would come too late"
        yield Violation(f"{key}.every={pruning.every}", f"{pruning.every}", expected, fix)


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
