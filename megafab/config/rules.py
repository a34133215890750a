"""Rules between sections of the configuration: each has an id, a predicate, and a message with the remedy.

They hold what Megatron's own `validate_args` would have refused for the options megafab exposes, and what
would otherwise fail on a cluster minutes after the queue, or train something else than was asked for. All
rules are tried and all violations are reported together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from megafab.checkpoint.config import Carry
from megafab.config import technique_rules
from megafab.config.rule import (
    CorpusFacts,
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
from megafab.config.schema import Precision, Recompute, RunConfig
from megafab.config.tree import did_you_mean
from megafab.data.derived import NEIGHBORS
from megafab.engine.capabilities import Feature, mode_of
from megafab.engine.config import EngineConfig, EngineName, Offload
from megafab.errors import ConfigError, ConfigErrors, UserError
from megafab.model.config import Position, RetroConfig
from megafab.model.shape import ModelShape
from megafab.optim.config import WHOLE_MATRICES, Count, Fall, OptimName, ScheduleKind
from megafab.optim.schedules import warmup_steps
from megafab.topology.config import ContextMethod

RULES: list[Rule] = []
rule = table(RULES)

MANIFEST = "manifest.json"
# A vocabulary may be this much larger than the tokenizer's: padding, not another tokenizer's size.
VOCAB_SLACK = 1024


class RuleErrors(ConfigErrors):
    """The rules a configuration breaks, one line each, beginning with the rule's id in brackets."""


def check_all(config: RunConfig, *, ranks: int, corpus: CorpusFacts | None) -> None:
    """Try every rule.

    Args:
        config: what the user asked for.
        ranks: the number of ranks of the job, whoever starts them.
        corpus: from `corpus_facts`; None leaves out what needs the corpus.

    Raises:
        RuleErrors: with one line for every violation.
    """
    facts = Facts(config, ranks, corpus)
    problems: list[ConfigError] = []
    sizes_valid = not any(_sizes(facts))
    for one in (*RULES, *technique_rules.RULES):
        if sizes_valid or not one.relates:
            problems += [ConfigError(f"[{one.id}] {where}", *rest) for where, *rest in one.find(facts)]
    if problems:
        raise RuleErrors(problems)


def corpus_facts(config: RunConfig) -> CorpusFacts:
    """Read what the rules need from the manifest of `data.path`; the shards themselves are not looked at.

    What is wrong with it does not raise here: the rule `corpus` reports it together with the others.
    """
    path = config.data.path
    file, where = Path(path) / MANIFEST, f"data.path={path}"
    expected = f"a directory with {MANIFEST}"
    fix = f"make one: megafab data out={path} sources={{...}}; or give data.path another directory"
    if not Path(path).is_dir():
        return CorpusFacts(path, problem=Violation(where, "no such directory", expected, fix))
    try:
        manifest = cast(dict[str, Any], json.loads(file.read_text(encoding="utf-8")))
        tokens = {domain["name"]: domain["splits"]["train"]["tokens"] for domain in manifest["domains"]}
        vocab_size, fingerprint = manifest["tokenizer"]["vocab_size"], manifest.get("fingerprint", "")
        valid = {domain["name"]: domain["splits"]["valid"]["tokens"] for domain in manifest["domains"]}
        return CorpusFacts(path, vocab_size, tokens, fingerprint, valid)
    except FileNotFoundError:
        return CorpusFacts(path, problem=Violation(where, f"no {MANIFEST} in it", expected, fix))
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"a {MANIFEST} that cannot be read ({type(error).__name__}: {error})"
        return CorpusFacts(path, problem=Violation(where, found, "the manifest that megafab data wrote", fix))


# -- values by themselves ------------------------------------------------------------------------------------

_AT_LEAST_ONE = (
    *("model.layers", "model.hidden", "model.heads", "model.kv_heads", "model.head_dim", "model.ffn"),
    *("model.seq_len", "model.vocab", "model.vocab_multiple"),
    *("model.moe.top_k", "model.moe.ffn", "model.moe.every"),
    *("model.retro.neighbors", "model.retro.retrieved", "model.retro.encoder_layers"),
    *("parallel.tensor", "parallel.pipeline", "parallel.virtual_pipeline", "parallel.context"),
    *("parallel.expert", "engine.bucket_parameters", "train.steps", "train.tokens", "train.global_batch"),
    *("train.micro_batch", "train.head_chunk", "train.log_every", "train.max_skipped", "checkpoint.keep"),
    *("launch.ranks", "launch.nodes", "launch.threads", "launch.timeout_minutes", "techniques.ema.every"),
    *("techniques.token_dropping.start", "techniques.token_dropping.round_to"),
    "techniques.gradual_pruning.every",
    *("resilience.spikes.window", "resilience.spikes.min_steps", "resilience.spikes.patience"),
    "resilience.spikes.max_rollbacks",
    *("data.block", "optim.muon.ns_steps", "optim.soap.frequency", "optim.soap.max_dim"),
)
_AT_LEAST_ZERO = (
    *("model.moe.experts", "model.moe.shared_ffn", "model.retro.chunk"),
    *("train.seed", "eval.every", "eval.samples"),
    *("train.batch_ramp.start", "train.batch_ramp.increment", "train.batch_ramp.samples"),
    *("engine.persistent_parameters", "resilience.check_every", "resilience.spikes.margin"),
    "resilience.straggler_every",
    *("checkpoint.every", "checkpoint.keep_every"),
)


@rule("size", relates=False)
def _sizes(facts: Facts) -> Iterator[Violation]:
    for minimum, keys in ((1, _AT_LEAST_ONE), (0, _AT_LEAST_ZERO)):
        for key in keys:
            value = value_at(facts.config, key)
            if value is not None and value < minimum:
                yield Violation(
                    f"{key}={value}", f"{value}", f"at least {minimum}", f"{key}={minimum} or more"
                )


_RANGES = (
    positive("model.norm_eps"),
    positive("model.rope_base"),
    positive("model.init_std"),
    below_one("model.dropout"),
    not_negative("model.moe.aux_loss"),
    not_negative("model.moe.z_loss"),
    positive("model.moe.capacity_factor"),
    positive("optim.lr"),
    not_negative("optim.weight_decay"),
    below_one("optim.beta1"),
    below_one("optim.beta2"),
    positive("optim.eps"),
    not_negative("optim.clip"),
    below_one("optim.muon.momentum"),
    positive("optim.muon.adamw_lr_ratio"),
    below_one("optim.soap.shampoo_beta"),
    not_negative("schedule.warmup"),
    not_negative("schedule.cooldown"),
    not_negative("schedule.decay"),
    Range("schedule.start_ratio", 0, 1, "between 0 and 1"),
    Range("schedule.constant_ratio", 0, 1, "more than 0 and at most 1", open_low=True),
    Range("schedule.min_ratio", 0, 1, "between 0 and 1"),
    not_negative("data.temperature"),
    positive("data.max_epochs"),
    positive("resilience.spikes.threshold"),
    positive("resilience.spikes.norm_threshold"),
    positive("resilience.stall_seconds"),
    Range("resilience.straggler_ratio", 1, math.inf, "more than 1", open_low=True),
)


@rule("range", relates=False)
def _ranges(facts: Facts) -> Iterator[Violation]:
    for allowed in _RANGES:
        yield from allowed.violations(facts)


# -- the model -----------------------------------------------------------------------------------------------


def _divides(key: str, value: int, by: str, divisor: int, fix: str) -> Iterator[Violation]:
    """The commonest rule: `value` must be a multiple of `divisor`."""
    if value % divisor:
        yield Violation(
            f"{key}={value}", f"{value} % {divisor} = {value % divisor}", f"a multiple of {by}", fix
        )


@rule("head-size")
def _head_size(facts: Facts) -> Iterator[Violation]:
    model = facts.config.model
    if model.head_dim is None:
        fix = "change model.heads, or set model.head_dim"
        yield from _divides("model.hidden", model.hidden, f"model.heads={model.heads}", model.heads, fix)


@rule("rope-head-size")
def _rope_head_size(facts: Facts) -> Iterator[Violation]:
    model = facts.config.model
    size = model.head_dim or model.hidden // model.heads
    if model.position is Position.rope and size % 2:
        where = f"model.head_dim={model.head_dim}" if model.head_dim else f"model.hidden={model.hidden}"
        fix = "choose an even head size, or model.position=learned"
        yield Violation(where, f"heads of size {size}", "an even size: rope rotates pairs", fix)


@rule("grouped-query")
def _grouped_query(facts: Facts) -> Iterator[Violation]:
    kv, heads = facts.kv_heads, facts.config.model.heads
    yield from _divides("model.heads", heads, f"model.kv_heads={kv}", kv, "change model.kv_heads")


@rule("moe-top-k")
def _moe_top_k(facts: Facts) -> Iterator[Violation]:
    moe = facts.config.model.moe
    if moe.experts and moe.top_k > moe.experts:
        expected, fix = f"at most model.moe.experts={moe.experts}", f"model.moe.top_k={moe.experts} or less"
        yield Violation(f"model.moe.top_k={moe.top_k}", f"{moe.top_k}", expected, fix)


@rule("moe-off")
def _moe_off(facts: Facts) -> Iterator[Violation]:
    moe = facts.config.model.moe
    if not moe.experts:
        for name, value in (("ffn", moe.ffn), ("shared_ffn", moe.shared_ffn)):
            if value:
                fix = f"set model.moe.experts, or leave model.moe.{name} out"
                yield Violation(f"model.moe.{name}={value}", "a model without experts", "experts", fix)


@rule("moe-bias")
def _moe_bias(facts: Facts) -> Iterator[Violation]:
    model = facts.config.model
    if model.moe.experts and model.bias:
        expected = "model.bias=false: Megatron does not train experts with biases"
        yield Violation("model.bias=true", "a model with experts", expected, "model.bias=false")


# -- retrieval -----------------------------------------------------------------------------------------------


@rule("retro-off")
def _retro_off(facts: Facts) -> Iterator[Violation]:
    retro, retrieval = facts.config.model.retro, facts.config.data.retrieval
    if retro.chunk:
        if retrieval is None:
            found, expected = "data.retrieval=null", "the neighbours of each chunk"
            fix = (
                f"megafab data retrieval path={facts.config.data.path} chunk={retro.chunk}, then name it here"
            )
            yield Violation(f"model.retro.chunk={retro.chunk}", found, expected, fix)
        return
    given = {"data.retrieval": retrieval} if retrieval is not None else {}
    for name in ("neighbors", "retrieved", "encoder_layers", "in_context", "layers"):
        if getattr(retro, name) != getattr(RetroConfig(), name):
            given[f"model.retro.{name}"] = getattr(retro, name)
    for key, value in given.items():
        fix = f"model.retro.chunk=64, for example, or leave {key} out"
        yield Violation(f"{key}={value}", "model.retro.chunk=0", "a model that looks at neighbours", fix)


@rule("retro-layers")
def _retro_layers(facts: Facts) -> Iterator[Violation]:
    chosen, count = facts.config.model.retro.layers, facts.config.model.layers
    if chosen is None or not facts.config.model.retro.chunk:
        return
    if not chosen or chosen != sorted(set(chosen)) or not 1 <= chosen[0] <= chosen[-1] <= count:
        expected = f"layers from 1 to model.layers={count}, ascending, each once"
        yield Violation(f"model.retro.layers={chosen}", f"{chosen}", expected, "model.retro.layers=null")


@rule("retro-kv-heads")
def _retro_kv_heads(facts: Facts) -> Iterator[Violation]:
    kv, tensor = facts.kv_heads, facts.config.parallel.tensor
    if facts.config.model.retro.chunk and kv % tensor:
        expected = f"a multiple of parallel.tensor={tensor}: heads that look at neighbours are not copied"
        yield Violation(f"model.kv_heads={kv}", f"{kv}", expected, f"parallel.tensor={math.gcd(kv, tensor)}")


@rule("retro-lengths")
def _retro_lengths(facts: Facts) -> Iterator[Violation]:
    model, p = facts.config.model, facts.config.parallel
    chunk, retrieved = model.retro.chunk, model.retro.length
    if not chunk:
        return
    fix = f"model.seq_len={_next_multiple(model.seq_len, chunk)}"
    yield from _divides("model.seq_len", model.seq_len, f"model.retro.chunk={chunk}", chunk, fix)
    where = f"model.retro.retrieved={retrieved}"
    if p.sequence and retrieved % p.tensor:
        expected = f"a multiple of parallel.tensor={p.tensor}, over which neighbours are split"
        fix = f"model.retro.retrieved={_next_multiple(retrieved, p.tensor)}, or parallel.sequence=false"
        yield Violation(where, f"{retrieved}", expected, fix)
    if model.retro.in_context and (retrieved % chunk or retrieved >= model.seq_len):
        expected = f"whole chunks of {chunk}, fewer than model.seq_len={model.seq_len}, of which it is a part"
        fix = f"model.retro.retrieved={chunk}, or a longer model.seq_len"
        yield Violation(f"{where} with model.retro.in_context", f"{retrieved}", expected, fix)
    if model.position is Position.learned and retrieved > model.seq_len:
        expected = f"at most model.seq_len={model.seq_len}: that many positions are learned"
        yield Violation(where, f"{retrieved}", expected, f"model.retro.retrieved={model.seq_len}")


@rule("retro-neighbors")
def _retro_neighbors(facts: Facts) -> Iterator[Violation]:
    """The manifest only: its files are looked at when the run is built."""
    retro, retrieval, corpus = facts.config.model.retro, facts.config.data.retrieval, facts.data
    if not retro.chunk or retrieval is None or corpus is None:
        return
    where = f"data.retrieval={retrieval}"
    named = f"path={corpus.path} chunk={retro.chunk} name={Path(retrieval).name}"
    fix = f"make them: megafab data retrieval {named}"
    try:
        directory = NEIGHBORS.directory(Path(corpus.path), retrieval)
        manifest = NEIGHBORS.read(directory)
        NEIGHBORS.require_corpus(directory, manifest, corpus.fingerprint)
    except UserError as error:
        yield Violation(where, f"{error.found} ({error.where})", error.expected, fix)
        return
    if manifest["chunk"] != retro.chunk:
        found = f"neighbours of chunks of {manifest['chunk']} tokens"
        yield Violation(where, found, f"chunks of model.retro.chunk={retro.chunk}", f"{fix} overwrite=true")
    if manifest["neighbors"] < retro.neighbors:
        found = f"{manifest['neighbors']} neighbours of each chunk"
        more = f"neighbors={retro.neighbors} overwrite=true"
        fix = f"model.retro.neighbors={manifest['neighbors']}, or {fix} {more}"
        yield Violation(where, found, f"model.retro.neighbors={retro.neighbors} or more", fix)


@rule("retro-context")
def _retro_context(facts: Facts) -> Iterator[Violation]:
    if facts.config.model.retro.chunk and facts.config.parallel.context > 1:
        where, fix = f"parallel.context={facts.config.parallel.context}", "parallel.context=1"
        found = f"model.retro.chunk={facts.config.model.retro.chunk}"
        expected = "whole sequences: a chunk's neighbours are looked at by the next chunk, on another rank"
        yield Violation(where, found, expected, fix)


# -- the mesh ------------------------------------------------------------------------------------------------


@rule("ranks")
def _ranks(facts: Facts) -> Iterator[Violation]:
    p = facts.config.parallel
    if facts.ranks % facts.model_ranks:
        product = f"tensor {p.tensor} x pipeline {p.pipeline} x context {p.context} = {facts.model_ranks}"
        more = -(-facts.ranks // facts.model_ranks) * facts.model_ranks
        fix = f"run {more} ranks, or lower one of parallel.tensor, parallel.pipeline, parallel.context"
        yield Violation(
            f"launch.ranks={facts.ranks}", f"{facts.ranks} ranks", f"a multiple of {product}", fix
        )


@rule("launcher")
def _launcher(facts: Facts) -> Iterator[Violation]:
    asked = facts.config.launch.ranks
    if asked not in (1, facts.ranks):
        found = f"{facts.ranks} ranks started by torchrun or srun"
        fix = f"leave launch.ranks out, or have {asked} ranks started"
        yield Violation(f"launch.ranks={asked}", found, "the same number", fix)


@rule("stall-before-timeout")
def _stall_before_timeout(facts: Facts) -> Iterator[Violation]:
    stall, minutes = facts.config.resilience.stall_seconds, facts.config.launch.timeout_minutes
    if facts.ranks > 1 and stall is not None and stall >= minutes * 60:
        expected = (
            f"less than launch.timeout_minutes={minutes}, after which the collectives give up unexplained"
        )
        fix = f"resilience.stall_seconds={minutes * 20}, or a longer launch.timeout_minutes"
        yield Violation(f"resilience.stall_seconds={stall:g}", f"{stall:g} s", expected, fix)


@rule("heads-by-tensor")
def _heads_by_tensor(facts: Facts) -> Iterator[Violation]:
    heads, tensor = facts.config.model.heads, facts.config.parallel.tensor
    fix = "change parallel.tensor"
    yield from _divides("model.heads", heads, f"parallel.tensor={tensor}", tensor, fix)


@rule("kv-heads-by-tensor")
def _kv_heads_by_tensor(facts: Facts) -> Iterator[Violation]:
    kv, tensor = facts.kv_heads, facts.config.parallel.tensor
    if kv % tensor and tensor % kv:
        expected = f"a multiple or a divisor of parallel.tensor={tensor}"
        fix = "change model.kv_heads or parallel.tensor"
        yield Violation(f"model.kv_heads={kv}", f"{kv}", expected, fix)


@rule("ffn-by-tensor")
def _ffn_by_tensor(facts: Facts) -> Iterator[Violation]:
    tensor, moe = facts.config.parallel.tensor, facts.config.model.moe
    # Experts are split over ranks whole (expert tensor size 1), so that model.moe.ffn is free.
    every_layer_moe = moe.experts > 0 and moe.every == 1
    ffn = ModelShape.of(facts.config.model, tokenizer_vocab=1).ffn
    fix = "change it or parallel.tensor"
    if not every_layer_moe:
        yield from _divides("model.ffn", ffn, f"parallel.tensor={tensor}", tensor, fix)
    yield from _divides("model.moe.shared_ffn", moe.shared_ffn, f"parallel.tensor={tensor}", tensor, fix)


@rule("vocab-by-tensor")
def _vocab_by_tensor(facts: Facts) -> Iterator[Violation]:
    tensor, shape = facts.config.parallel.tensor, facts.shape
    if shape is not None and shape.vocab % tensor:
        multiple = facts.config.model.vocab_multiple
        found = f"a vocabulary padded to {shape.vocab}"
        expected = f"a multiple of parallel.tensor={tensor}"
        fix = f"model.vocab_multiple={math.lcm(multiple, tensor)}"
        yield Violation(f"model.vocab_multiple={multiple}", found, expected, fix)


@rule("layers-by-pipeline")
def _layers_by_pipeline(facts: Facts) -> Iterator[Violation]:
    layers, p = facts.config.model.layers, facts.config.parallel
    by = f"parallel.pipeline={p.pipeline}"
    if p.virtual_pipeline > 1:
        by += f" x parallel.virtual_pipeline={p.virtual_pipeline}"
    yield from _divides("model.layers", layers, by, p.pipeline * p.virtual_pipeline, "change one of them")


@rule("interleaving")
def _interleaving(facts: Facts) -> Iterator[Violation]:
    p = facts.config.parallel
    if p.virtual_pipeline > 1 and p.pipeline == 1:
        fix = "parallel.virtual_pipeline=1, or more pipeline stages"
        where = f"parallel.virtual_pipeline={p.virtual_pipeline}"
        yield Violation(where, "parallel.pipeline=1", "at least 2 pipeline stages", fix)


@rule("interleaved-micro-batches")
def _interleaved_micro_batches(facts: Facts) -> Iterator[Violation]:
    p, train = facts.config.parallel, facts.config.train
    if p.virtual_pipeline == 1:
        return
    replica = train.micro_batch * facts.data_ranks
    for key, size in _batches(facts):
        if size % replica == 0 and (size // replica) % p.pipeline:
            found = f"{size // replica} micro-batches"
            expected = f"a multiple of parallel.pipeline={p.pipeline}: the interleaved schedule needs it"
            fix = f"{key}={_next_multiple(size, replica * p.pipeline)}, or parallel.virtual_pipeline=1"
            yield Violation(f"{key}={size}", found, expected, fix)


@rule("sequence-parallel")
def _sequence_parallel(facts: Facts) -> Iterator[Violation]:
    if facts.config.parallel.sequence and facts.config.parallel.tensor == 1:
        fix = "parallel.sequence=false, or parallel.tensor=2 or more"
        expected = "parallel.tensor of 2 or more, over which to split sequences"
        yield Violation("parallel.sequence=true", "parallel.tensor=1", expected, fix)


@rule("sequence-length")
def _sequence_length(facts: Facts) -> Iterator[Violation]:
    length, (unit, axes) = facts.config.model.seq_len, facts.sequence_unit
    if length % unit:
        expected = f"a multiple of {unit}, to be split over {axes}"
        fix = f"model.seq_len={_next_multiple(length, unit)}"
        yield Violation(f"model.seq_len={length}", f"{length}", expected, fix)


@rule("ulysses-heads")
def _ulysses_heads(facts: Facts) -> Iterator[Violation]:
    p = facts.config.parallel
    if p.context == 1 or p.context_method is not ContextMethod.ulysses:
        return
    for key, heads in (("model.heads", facts.config.model.heads), ("model.kv_heads", facts.kv_heads)):
        each = max(1, heads // p.tensor)
        if each % p.context:
            found = f"{each} a tensor rank"
            expected = f"a multiple of parallel.context={p.context}: ulysses splits heads"
            fix = "parallel.context_method=allgather, or a smaller parallel.context"
            yield Violation(f"{key}={heads}", found, expected, fix)


@rule("expert-without-moe")
def _expert_without_moe(facts: Facts) -> Iterator[Violation]:
    expert = facts.config.parallel.expert
    if expert > 1 and not facts.config.model.moe.experts:
        fix = "parallel.expert=1, or a model with model.moe.experts"
        yield Violation(f"parallel.expert={expert}", "a model without experts", "experts to spread", fix)


@rule("experts-by-expert")
def _experts_by_expert(facts: Facts) -> Iterator[Violation]:
    experts, expert = facts.config.model.moe.experts, facts.config.parallel.expert
    fix = "change parallel.expert"
    yield from _divides("model.moe.experts", experts, f"parallel.expert={expert}", expert, fix)


@rule("expert-ranks")
def _expert_ranks(facts: Facts) -> Iterator[Violation]:
    p = facts.config.parallel
    stage = facts.ranks // p.pipeline
    if facts.ranks % facts.model_ranks == 0 and stage % p.expert:
        expected = f"a divisor of the {stage} ranks of a pipeline stage"
        yield Violation(f"parallel.expert={p.expert}", f"{p.expert}", expected, "change it or the ranks")


@rule("moe-tensor-sequence")
def _moe_tensor_sequence(facts: Facts) -> Iterator[Violation]:
    p = facts.config.parallel
    if facts.config.model.moe.experts and p.tensor > 1 and not p.sequence:
        found = f"parallel.tensor={p.tensor} with experts"
        expected = "sequence parallelism: Megatron does not train experts on a tensor axis without it"
        yield Violation("parallel.sequence=false", found, expected, "parallel.sequence=true")


@rule("overlap-param-gather")
def _overlap_param_gather(facts: Facts) -> Iterator[Violation]:
    engine = facts.config.engine
    if engine.overlap_param_gather and not engine.overlap_grad_reduce:
        fix = "engine.overlap_grad_reduce=true, or engine.overlap_param_gather=false"
        expected = "engine.overlap_grad_reduce=true"
        yield Violation("engine.overlap_param_gather=true", "engine.overlap_grad_reduce=false", expected, fix)


@rule("engine-capabilities", relates=False)
def _engine_capabilities(facts: Facts) -> Iterator[Violation]:
    """What was not shown to train right is refused (`engine/capabilities.py`)."""
    engine = facts.config.engine
    if engine.name is EngineName.megatron and (engine.zero_stage is not None or _zero_only(engine)):
        return  # reported by `engine-keys`
    mode = mode_of(engine.name, engine.zero_stage, engine.offload)
    if mode is None:
        stage = "null" if engine.zero_stage is None else str(engine.zero_stage)
        fix = "engine.zero_stage=1, 2 or 3"
        yield Violation(f"engine.zero_stage={stage}", f"{stage}, engine=deepspeed", "a stage of ZeRO", fix)
        return
    features = features_of(facts.config)
    if refusal := mode.refusal(features):
        names = ", ".join(f.value for f in Feature if f in features)
        found = f"{mode.name}{' with ' if names else ''}{names}: {refusal.reason}"
        expected = "what is shown to train right (README, engines)"
        yield Violation(" ".join(mode.overrides), found, expected, refusal.nearest)


def features_of(config: RunConfig) -> frozenset[Feature]:
    """The features of a configuration that `engine/capabilities.py` distinguishes."""
    p, train = config.parallel, config.train
    on = {
        Feature.tensor: p.tensor > 1,
        Feature.sequence: p.sequence,
        Feature.pipeline: p.pipeline > 1,
        Feature.interleaved: p.virtual_pipeline > 1,
        Feature.context: p.context > 1,
        Feature.expert: p.expert > 1,
        Feature.recompute: train.recompute is not Recompute.none,
        Feature.bf16: train.precision is Precision.bf16,
    }
    return frozenset(feature for feature, is_on in on.items() if is_on)


@rule("head-chunk")
def _head_chunk(facts: Facts) -> Iterator[Violation]:
    """A chunk of all tokens would compute their logits twice and save nothing."""
    config = facts.config
    tokens = config.train.micro_batch * config.model.seq_len // config.parallel.context
    chunk = config.train.head_chunk
    if chunk is not None and chunk >= tokens:
        yield Violation(
            f"train.head_chunk={chunk}",
            f"{chunk} tokens",
            f"fewer than the {tokens} of a micro-batch on a rank",
            f"train.head_chunk={max(1, tokens // 4)}, or null",
        )


@rule("engine-keys", relates=False)
def _engine_keys(facts: Facts) -> Iterator[Violation]:
    """Keys of one engine given to the other."""
    engine = facts.config.engine
    if engine.name is EngineName.megatron:
        for key, text in _zero_only(engine):
            fix = f"leave engine.{key} out, or engine=deepspeed"
            yield Violation(
                f"engine.{key}={text}", "engine=megatron", "engine=deepspeed, which knows it", fix
            )
        return
    if engine.overlap_param_gather:
        fix = "engine.overlap_param_gather=false, or engine=megatron"
        expected = "engine=megatron, which knows it"
        yield Violation("engine.overlap_param_gather=true", "engine=deepspeed", expected, fix)
    if engine.persistent_parameters is not None and engine.zero_stage != 3:
        where, found = f"engine.persistent_parameters={engine.persistent_parameters}", engine.zero_stage
        fix = "leave engine.persistent_parameters out, or engine.zero_stage=3"
        yield Violation(where, f"engine.zero_stage={found}", "stage 3, which gathers parameters", fix)


def _zero_only(engine: EngineConfig) -> list[tuple[str, str]]:
    """The keys of ZeRO that are set, with their values."""
    given = [
        ("zero_stage", engine.zero_stage),
        ("offload", None if engine.offload is Offload.none else engine.offload.value),
        ("persistent_parameters", engine.persistent_parameters),
    ]
    return [(key, str(value)) for key, value in given if value is not None]


# -- the optimizer -------------------------------------------------------------------------------------------


@rule("optim-options", relates=False)
def _optim_options(facts: Facts) -> Iterator[Violation]:
    optim = facts.config.optim
    name = optim.name.value
    if optim.name is OptimName.lion and optim.eps is not None:
        yield Violation(
            f"optim.eps={optim.eps:g}", "optim.name=lion", "no eps: Lion has none", "optim.eps=null"
        )
    if optim.name is not OptimName.lion and optim.eps is None:
        yield Violation("optim.eps=null", "nothing", f"a number, for optim.name={name}", "optim.eps=1e-8")
    for owner in (OptimName.muon, OptimName.soap):
        section, given = f"optim.{owner.value}", value_at(optim, owner.value) is not None
        if given and optim.name is not owner:
            fix = f"optim={owner.value}, or leave {section} out"
            yield Violation(section, f"optim.name={name}", f"optim.name={owner.value}, which they set", fix)
        if optim.name is owner and not given:
            fix = f"choose optim={owner.value}, which has them"
            yield Violation(f"optim.name={name}", f"{section} is null", "its settings", fix)


@rule("whole-matrices")
def _whole_matrices(facts: Facts) -> Iterator[Violation]:
    optim, engine = facts.config.optim.name, facts.config.engine.name
    if optim in WHOLE_MATRICES and engine is EngineName.deepspeed:
        yield Violation(
            f"engine.name=deepspeed optim.name={optim.value}",
            "ZeRO, which deals parameters to ranks in flat ranges",
            "an optimizer that updates every element on its own: adamw or lion",
            f"engine=megatron, which deals them to {optim.value} in whole matrices; or optim=adamw",
        )


@rule("whole-matrices-gather")
def _whole_matrices_gather(facts: Facts) -> Iterator[Violation]:
    optim = facts.config.optim.name
    if optim in WHOLE_MATRICES and facts.config.engine.overlap_param_gather:
        yield Violation(
            "engine.overlap_param_gather=true",
            f"optim.name={optim.value}",
            "adamw or lion: new matrices are sent to the other ranks at the end of the step",
            "engine.overlap_param_gather=false",
        )


# -- the run -------------------------------------------------------------------------------------------------


def _batches(facts: Facts) -> Iterator[tuple[str, int]]:
    """The sizes that every global batch of the run is a sum of."""
    train = facts.config.train
    yield "train.global_batch", train.global_batch
    if train.batch_ramp.start:
        yield "train.batch_ramp.start", train.batch_ramp.start
        yield "train.batch_ramp.increment", train.batch_ramp.increment


def _next_multiple(value: int, unit: int) -> int:
    return max(1, -(-value // unit)) * unit


@rule("global-batch")
def _global_batch(facts: Facts) -> Iterator[Violation]:
    micro, data = facts.config.train.micro_batch, facts.data_ranks
    if facts.ranks % facts.model_ranks:
        return
    for key, size in _batches(facts):
        if size % (micro * data):
            expected = f"a multiple of train.micro_batch={micro} x {data} data parallel ranks"
            fix = f"{key}={_next_multiple(size, micro * data)}, or another train.micro_batch"
            yield Violation(f"{key}={size}", f"{size} sequences", expected, fix)


@rule("batch-ramp")
def _batch_ramp(facts: Facts) -> Iterator[Violation]:
    ramp, final = facts.config.train.batch_ramp, facts.config.train.global_batch
    given = {"start": ramp.start, "increment": ramp.increment, "samples": ramp.samples}
    missing = [f"train.batch_ramp.{name}" for name, value in given.items() if not value]
    if 0 < len(missing) < len(given):
        fix = f"set {' and '.join(missing)}, or none of the three"
        where = " ".join(f"train.batch_ramp.{name}={value}" for name, value in given.items() if value)
        yield Violation(where, f"no {', no '.join(missing)}", "start, increment and samples", fix)
    elif not missing and (ramp.start >= final or (final - ramp.start) % ramp.increment):
        where = f"train.batch_ramp.start={ramp.start}"
        found = f"{ramp.start} plus steps of {ramp.increment}"
        fix = "choose start + n x increment = train.global_batch"
        yield Violation(where, found, f"to arrive at train.global_batch={final}", fix)


@rule("run-place", relates=False)
def _run_place(facts: Facts) -> Iterator[Violation]:
    for key in ("run.name", "run.dir"):
        if not value_at(facts.config, key).strip():
            yield Violation(f"{key}=", "nothing", "a name, under which the run is kept", f"give {key} a name")


@rule("run-length")
def _run_length(facts: Facts) -> Iterator[Violation]:
    train = facts.config.train
    if (train.steps is None) == (train.tokens is None):
        found = "neither" if train.steps is None else "both"
        fix = "add train.steps=1000, say" if train.steps is None else "set one of them to null"
        yield Violation("train.steps, train.tokens", found, "exactly one of them", fix)


@rule("counted-tokens", relates=False)
def _counted_tokens(facts: Facts) -> Iterator[Violation]:
    train = facts.config.train
    if train.count is not Count.tokens and train.steps is not None:
        fix = "train.tokens in place of train.steps, or leave train.count out"
        expected = "train.tokens, which it says how to count"
        yield Violation(f"train.count={train.count.name}", f"train.steps={train.steps}", expected, fix)
    elif train.count is not Count.tokens and facts.config.techniques.token_dropping is None:
        expected, fix = "technique=[token_dropping], which makes the difference", "leave train.count out"
        yield Violation(f"train.count={train.count.name}", "no layer that drops tokens", expected, fix)


_SCHEDULE_KEYS = {  # what a kind of schedule has beside the warm-up, and what of it must be given
    ScheduleKind.wsd: (("decay", "decay_shape"), ("decay",)),
    ScheduleKind.infinite: (
        ("cooldown", "cooldown_shape", "constant_ratio", "decay", "decay_shape"),
        ("cooldown", "constant_ratio"),
    ),
}


@rule("schedule-keys", relates=False)
def _schedule_keys(facts: Facts) -> Iterator[Violation]:
    schedule = facts.config.schedule
    kind, (known, needed) = schedule.kind, _SCHEDULE_KEYS.get(schedule.kind, ((), ()))
    for key in ("cooldown", "cooldown_shape", "constant_ratio", "decay", "decay_shape"):
        value = value_at(schedule, key)
        if value is not None and key not in known:
            shown, fix = getattr(value, "value", value), f"schedule.{key}=null, or a schedule that has it"
            expected = f"null, since {kind.value} has no such phase"
            yield Violation(f"schedule.{key}={shown}", f"schedule.kind={kind.value}", expected, fix)
        elif value is None and key in needed:
            fix = f"schedule={kind.value}, whose preset has them all"
            yield Violation(f"schedule.kind={kind.value}", f"no schedule.{key}", "one", fix)
    exponential = [k for k in ("cooldown_shape", "decay_shape") if value_at(schedule, k) is Fall.exponential]
    if exponential and schedule.min_ratio <= 0:
        fix, expected = "schedule.min_ratio=0.01, or another shape", "more than 0: it only multiplies"
        where = f"schedule.{exponential[0]}=exponential"
        yield Violation(where, f"schedule.min_ratio={schedule.min_ratio:g}", expected, fix)


@rule("schedule-length")
def _schedule_length(facts: Facts) -> Iterator[Violation]:
    schedule, total = facts.config.schedule, facts.total_steps
    if total is None:
        return
    phases = [("warm-up", "schedule.warmup", schedule.warmup)]
    if schedule.cooldown:
        phases.append(("cooldown", "schedule.cooldown", schedule.cooldown))
    if schedule.decay:
        phases.append(("decay", "schedule.decay", schedule.decay))
    if not all(math.isfinite(length) for _, _, length in phases):
        return  # `range` says so
    lengths = [round(length * total) if length < 1 else round(length) for _, _, length in phases]
    lengths[0] = warmup_steps(schedule, total)
    if sum(lengths) > total:
        where = " ".join(f"{key}={length:g}" for _, key, length in phases)
        found = " and ".join(f"{n} steps of {name}" for n, (name, _, _) in zip(lengths, phases, strict=True))
        fix = "shorten them, or give them as shares of the run (below 1)"
        yield Violation(where, found, f"no more than the run's {total} steps", fix)


@rule("start-ratio")
def _start_ratio(facts: Facts) -> Iterator[Violation]:
    schedule = facts.config.schedule
    if schedule.start_ratio and schedule.warmup == 0:
        where, fix = f"schedule.start_ratio={schedule.start_ratio:g}", "schedule.start_ratio=0, or a warm-up"
        yield Violation(where, "schedule.warmup=0", "a warm-up to begin there", fix)


@rule("whole-steps")
def _whole_steps(facts: Facts) -> Iterator[Violation]:
    for key in ("schedule.warmup", "schedule.cooldown", "schedule.decay", "techniques.token_dropping.steps"):
        value = value_at(facts.config, key)
        if value is not None and math.isfinite(value) and value >= 1 and value != round(value):
            expected = "a share of the run (below 1) or whole steps"
            yield Violation(f"{key}={value:g}", f"{value:g}", expected, f"{key}={round(value)}")


@rule("keep-every")
def _keep_every(facts: Facts) -> Iterator[Violation]:
    every, kept = facts.config.checkpoint.every, facts.config.checkpoint.keep_every
    if kept and (not every or kept % every):
        fix = "set checkpoint.every, or leave checkpoint.keep_every out"
        if every:
            fix = f"checkpoint.keep_every={_next_multiple(kept, every)}, or another checkpoint.every"
        expected = "a multiple of checkpoint.every: other steps are not saved"
        yield Violation(f"checkpoint.keep_every={kept}", f"checkpoint.every={every}", expected, fix)


@rule("spikes-history")
def _spikes_history(facts: Facts) -> Iterator[Violation]:
    spikes, most = facts.config.resilience.spikes, facts.config.train.max_skipped
    if spikes is None:
        return
    least = f"resilience.spikes.min_steps={spikes.min_steps}"
    if spikes.min_steps > spikes.window:
        expected = f"at most resilience.spikes.window={spikes.window}, which is all that is remembered"
        fix = f"resilience.spikes.min_steps={spikes.window}"
        yield Violation(least, f"{spikes.min_steps}", expected, fix)
    if spikes.min_steps < 2 * spikes.patience:
        expected = f"at least twice resilience.spikes.patience={spikes.patience}, to keep its median in place"
        fix = f"resilience.spikes.min_steps={2 * spikes.patience} or more"
        yield Violation(least, f"{spikes.min_steps}", expected, fix)
    if spikes.patience > most:
        expected = f"at most train.max_skipped={most}, which would end the run first"
        fix = f"resilience.spikes.patience={most}, or a larger train.max_skipped"
        where = f"resilience.spikes.patience={spikes.patience}"
        yield Violation(where, f"{spikes.patience}", expected, fix)


@rule("spikes-checkpoints")
def _spikes_checkpoints(facts: Facts) -> Iterator[Violation]:
    """When a spike is found, a checkpoint from before its margin is still there, however the saves fell."""
    spikes, checkpoint = facts.config.resilience.spikes, facts.config.checkpoint
    if spikes is None:
        return
    every, keep = checkpoint.every, checkpoint.keep
    reach = spikes.margin + spikes.patience
    if not every:
        fix = f"checkpoint.every={max(1, reach)}, for example"
        yield Violation("resilience.spikes", "checkpoint.every=0", "checkpoints to go back to", fix)
    elif (keep - 1) * every < reach:
        where = f"checkpoint.keep={keep} checkpoint.every={every}"
        expected = (
            f"{reach} or more, resilience.spikes.margin={spikes.margin} and the patience of {spikes.patience}"
        )
        fix = f"checkpoint.keep={-(-reach // every) + 1}, or a smaller resilience.spikes.margin"
        yield Violation(where, f"checkpoints of the last {(keep - 1) * every} steps", expected, fix)


@rule("start")
def _start(facts: Facts) -> Iterator[Violation]:
    start, resume = facts.config.start, facts.config.checkpoint.resume
    if start.checkpoint is None:
        for key, value in (("optimizer", start.optimizer), ("data", start.data)):
            if value is not Carry.reset:
                expected, fix = "a checkpoint to keep it from", "set start.checkpoint, or leave it out"
                yield Violation(f"start.{key}={value.value}", "no start.checkpoint", expected, fix)
    elif resume not in ("auto", "none"):
        where = f"start.checkpoint={start.checkpoint} checkpoint.resume={resume}"
        fix = "start.checkpoint begins a new run, checkpoint.resume goes on with one: leave one out"
        yield Violation(where, "two checkpoints", "one of them", fix)


@rule("data-change", relates=False)
def _data_change(facts: Facts) -> Iterator[Violation]:
    checkpoint = facts.config.checkpoint
    if checkpoint.allow_data_change and checkpoint.resume == "none":
        expected, fix = "a checkpoint whose data could differ", "leave checkpoint.allow_data_change out"
        yield Violation("checkpoint.allow_data_change=true", "checkpoint.resume=none", expected, fix)


@rule("eval-samples")
def _eval_samples(facts: Facts) -> Iterator[Violation]:
    section = facts.config.eval
    if section.every and not section.samples:
        fix = "eval.samples=64, or eval.every=0"
        yield Violation(f"eval.every={section.every}", "eval.samples=0", "samples to evaluate on", fix)
    valid = facts.data.valid_tokens if facts.data else None
    if section.samples and valid is not None and not sum(valid.values()):
        where, fix = f"eval.samples={section.samples}", "eval.samples=0, or a corpus with valid_fraction=0.01"
        yield Violation(where, "a corpus without a validation split", "text to evaluate on", fix)


# -- the data ------------------------------------------------------------------------------------------------


@rule("corpus", relates=False)
def _corpus(facts: Facts) -> Iterator[Violation]:
    if facts.corpus and facts.corpus.problem:
        yield facts.corpus.problem


@rule("vocab-of-tokenizer")
def _vocab_of_tokenizer(facts: Facts) -> Iterator[Violation]:
    vocab, corpus = facts.config.model.vocab, facts.data
    if vocab is None or corpus is None:
        return
    most = _next_multiple(corpus.vocab_size, facts.config.model.vocab_multiple) + VOCAB_SLACK
    if not corpus.vocab_size <= vocab <= most:
        expected = f"the {corpus.vocab_size} of the tokenizer in data.path={corpus.path}, or a little more"
        yield Violation(
            f"model.vocab={vocab}", f"{vocab}", expected, "model.vocab=null takes the tokenizer's"
        )


@rule("mixture-domains")
def _mixture_domains(facts: Facts) -> Iterator[Violation]:
    mixture, corpus = facts.config.data.mixture, facts.data
    if mixture is None or corpus is None:
        return
    for name in mixture:
        if name not in corpus.tokens:
            known = ", ".join(corpus.tokens)
            fix = did_you_mean(name, corpus.tokens, prefix="data.mixture.") or "use the names of the corpus"
            expected = f"a domain of data.path={corpus.path}: {known}"
            yield Violation(f"data.mixture.{name}={mixture[name]:g}", f"{name}", expected, fix)


@rule("mixture-weights")
def _mixture_weights(facts: Facts) -> Iterator[Violation]:
    mixture = facts.config.data.mixture
    if mixture is None:
        return
    for name, weight in mixture.items():
        if not (math.isfinite(weight) and weight >= 0):
            where, fix = f"data.mixture.{name}={weight:g}", "give it a weight of 0 or more"
            yield Violation(where, f"{weight:g}", "0 or more", fix)
    if not any(weight > 0 for weight in mixture.values()):
        fix = "give a domain a weight above 0, or data.mixture=null for weights by tokens"
        yield Violation("data.mixture", "no weight above 0", "at least one", fix)
    elif all(map(math.isfinite, mixture.values())) and not math.isfinite(sum(mixture.values())):
        fix = "scale them down"
        yield Violation("data.mixture", "weights too large to add up", "numbers like shares", fix)


@rule("temperature")
def _temperature(facts: Facts) -> Iterator[Violation]:
    data = facts.config.data
    if data.mixture is not None and data.temperature != 1.0:
        where, fix = f"data.temperature={data.temperature:g}", "leave one of the two out"
        yield Violation(where, "data.mixture, which gives the weights itself", "data.mixture=null", fix)


@rule("mixture-block")
def _mixture_block(facts: Facts) -> Iterator[Violation]:
    block = facts.config.data.block
    for key, size in _batches(facts):
        if size % block:
            where, fix = f"data.block={block}", f"data.block=1, or {key}={_next_multiple(size, block)}"
            yield Violation(where, f"{key}={size}", "whole blocks in every step", fix)


@rule("skip", relates=False)
def _skip(facts: Facts) -> Iterator[Violation]:
    data = facts.config.data
    for pair in map(list, data.skip):
        where, found = f"data.skip={[list(pair) for pair in data.skip]}", f"{pair}"
        if len(pair) != 2 or pair[0] < 0 or pair[1] < 1:
            fix = "data.skip=[[1000,64]] passes over samples 1000 to 1063"
            yield Violation(where, found, "[first, count] of samples, from 0 on and at least one", fix)
        elif data.block > 0 and any(number % data.block for number in pair):
            expected = f"whole blocks of data.block={data.block} samples, for steps to have whole ones"
            first = pair[0] // data.block * data.block
            fix = f"give [{first},{_next_multiple(sum(pair) - first, data.block)}]"
            yield Violation(where, found, expected, fix)


@rule("domain-length")
def _domain_length(facts: Facts) -> Iterator[Violation]:
    corpus, window = facts.data, facts.config.model.seq_len + 1
    if corpus is None:
        return
    mixture = facts.config.data.mixture
    if not sum(corpus.tokens.values()):
        fix = "build it again with megafab data, and see what its filters dropped"
        yield Violation(f"data.path={corpus.path}", "no training tokens", "some", fix)
    for name, tokens in corpus.tokens.items():
        weight = tokens if mixture is None else mixture.get(name, 0)
        if weight > 0 and tokens < window:
            expected = f"at least model.seq_len + 1 = {window} in each domain that is read"
            fix = f"data.mixture without {name}, more text in it, or a smaller model.seq_len"
            yield Violation(f"data.path={corpus.path}", f"{tokens} tokens in domain {name}", expected, fix)
