"""Every rule: what breaks it, the exact line it gives, and what it lets pass."""

from __future__ import annotations

import atexit
import dataclasses
import json
import math
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megafab.checkpoint.config import Carry, CheckpointConfig
from megafab.config import rules, technique_rules
from megafab.config.rule import CorpusFacts
from megafab.config.rules import RuleErrors, check_all, corpus_facts
from megafab.config.schema import RunConfig, TrainConfig
from megafab.data.config import DataConfig
from megafab.data.derived import DIFFICULTY, NEIGHBORS
from megafab.engine.config import EngineName, Offload
from megafab.model.config import ModelConfig, Position, RetroConfig
from megafab.optim.config import Count, Fall, MuonConfig, OptimConfig, OptimName, ScheduleKind, SOAPConfig
from megafab.resilience.config import SpikesConfig
from megafab.techniques.config import (
    CurriculumConfig,
    DifficultyKind,
    DynamicLoadingConfig,
    EMAConfig,
    FreezingConfig,
    GradualPruningConfig,
    OnlineMixingConfig,
    PacingConfig,
    PacingShape,
    ReplayConfig,
    Reward,
    SampleReweightingConfig,
    SequenceCurriculumConfig,
    SparsityPattern,
    StaticSparsityConfig,
    TokenDroppingConfig,
    TokenSelectionConfig,
)
from megafab.topology.config import ContextMethod

# A valid run: 8 layers, 8 heads with 4 key-value heads, on one rank.
BASE = RunConfig(
    model=ModelConfig(name="m", layers=8, hidden=64, heads=8, kv_heads=4, ffn=96, seq_len=32),
    train=TrainConfig(steps=100, global_batch=8, micro_batch=1),
    optim=OptimConfig(lr=1e-3),
    data=DataConfig(path="corpus"),
)
RULES = (*rules.RULES, *technique_rules.RULES)
TWO_FOUR = SparsityPattern.two_four
DROPPING = TokenDroppingConfig(start=16, steps=10, round_to=4)  # of 32 tokens
CORPUS = CorpusFacts("corpus", vocab_size=1000, tokens={"books": 5000, "code": 900})
PACING = PacingConfig(start=8, end=32, steps=50, round_to=8)


SEQUENCES = "techniques.sequence_curriculum.pacing"
STEPS = {"shape": PacingShape.step, "levels": (8.0, 16.0, 32.0), "last_steps": (5, 9)}


@cache
def index() -> str:
    """The path of an index of difficulty that fits BASE and CORPUS: no more than its manifest."""
    directory = tempfile.mkdtemp(prefix="megafab-index-")
    atexit.register(shutil.rmtree, directory)
    content = {"corpus": CORPUS.fingerprint, "metric": "rarity", "seq_len": 32, "windows": {}}
    DIFFICULTY.write(Path(directory), content)
    return directory


@cache
def neighbors() -> str:
    """The path of neighbours that fit CORPUS, in chunks of 16 tokens: no more than their manifest."""
    directory = tempfile.mkdtemp(prefix="megafab-neighbors-")
    atexit.register(shutil.rmtree, directory)
    facts = {"corpus": CORPUS.fingerprint, "chunk": 16, "neighbors": 4}
    content = dict.fromkeys(NEIGHBORS.keys, "") | facts
    NEIGHBORS.write(Path(directory), content)
    return directory


def retro(**changes: Any) -> dict[str, Any]:
    """A model that looks at neighbours, and has them."""
    return {"model.retro": RetroConfig(**{"chunk": 16, **changes}), "data.retrieval": neighbors()}


def curriculum(**pacing: Any) -> dict[str, Any]:
    """By threshold, with a pacing that is fine but for what is given."""
    changed = dataclasses.replace(PACING, **pacing)
    return {"techniques.curriculum": CurriculumConfig("none", DifficultyKind.threshold, changed)}


def indexed() -> dict[str, Any]:
    """A curriculum with an index."""
    return {"techniques.curriculum": CurriculumConfig(index(), DifficultyKind.threshold, PACING)}


def spikes(**changes: Any) -> dict[str, Any]:
    """The controller of loss spikes, and checkpoints that suffice but for what is given."""
    return {"resilience.spikes": SpikesConfig(**changes), "checkpoint.every": 103}


def sequences(**pacing: Any) -> dict[str, Any]:
    changed = dataclasses.replace(PACING, **pacing)
    return {"techniques.sequence_curriculum": SequenceCurriculumConfig(pacing=changed)}


RULES = (*rules.RULES, *technique_rules.RULES)


def change(config: Any, changes: dict[str, Any]) -> Any:
    """`config` with the values at dotted keys replaced."""
    for key, value in changes.items():
        name, _, rest = key.partition(".")
        inner = change(getattr(config, name), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{name: inner})
    return config


def violations(changes: dict[str, Any], ranks: int = 1, corpus: CorpusFacts | None = CORPUS) -> list[str]:
    try:
        check_all(change(BASE, changes), ranks=ranks, corpus=corpus)
    except RuleErrors as errors:
        return str(errors).splitlines()
    return []


MUON = {"optim.name": OptimName.muon, "optim.muon": MuonConfig()}

# (rule, changes, ranks, the line)
BROKEN: list[tuple[str, dict[str, Any], int, str]] = [
    (
        *("retro-off", {"data.retrieval": "tfidf-64"}, 1),
        "data.retrieval=tfidf-64: found model.retro.chunk=0, expected a model that looks at neighbours. "
        "Fix: model.retro.chunk=64, for example, or leave data.retrieval out",
    ),
    (
        *("retro-off", {"model.retro.in_context": True}, 1),
        "model.retro.in_context=True: found model.retro.chunk=0, expected a model that looks at neighbours. "
        "Fix: model.retro.chunk=64, for example, or leave model.retro.in_context out",
    ),
    (
        *("retro-off", {"model.retro.chunk": 16}, 1),
        "model.retro.chunk=16: found data.retrieval=null, expected the neighbours of each chunk. Fix: "
        "megafab data retrieval path=corpus chunk=16, then name it here",
    ),
    (
        *("retro-layers", retro(layers=[3, 9]), 1),
        "model.retro.layers=[3, 9]: found [3, 9], expected layers from 1 to model.layers=8, ascending, each "
        "once. Fix: model.retro.layers=null",
    ),
    (
        *("retro-kv-heads", {**retro(), "parallel.tensor": 8}, 8),
        "model.kv_heads=4: found 4, expected a multiple of parallel.tensor=8: heads that look at neighbours "
        "are not copied. Fix: parallel.tensor=4",
    ),
    (
        *("retro-lengths", {**retro(), "model.seq_len": 24}, 1),
        "model.seq_len=24: found 24 % 16 = 8, expected a multiple of model.retro.chunk=16. "
        "Fix: model.seq_len=32",
    ),
    (
        *("retro-lengths", {**retro(retrieved=17), "parallel.tensor": 2, "parallel.sequence": True}, 2),
        "model.retro.retrieved=17: found 17, expected a multiple of parallel.tensor=2, over which neighbours "
        "are split. Fix: model.retro.retrieved=18, or parallel.sequence=false",
    ),
    (
        *("retro-lengths", retro(in_context=True), 1),
        "model.retro.retrieved=32 with model.retro.in_context: found 32, expected whole chunks of 16, fewer "
        "than model.seq_len=32, of which it is a part. Fix: model.retro.retrieved=16, or a longer "
        "model.seq_len",
    ),
    (
        *("retro-lengths", {**retro(retrieved=33), "model.position": Position.learned}, 1),
        "model.retro.retrieved=33: found 33, expected at most model.seq_len=32: that many positions are "
        "learned. Fix: model.retro.retrieved=32",
    ),
    (
        *("retro-neighbors", retro(neighbors=5), 1),
        f"data.retrieval={neighbors()}: found 4 neighbours of each chunk, expected "
        "model.retro.neighbors=5 or more. Fix: model.retro.neighbors=4, or make them: megafab data "
        f"retrieval path=corpus chunk=16 name={Path(neighbors()).name} neighbors=5 overwrite=true",
    ),
    (
        *("retro-neighbors", retro(chunk=8), 1),
        f"data.retrieval={neighbors()}: found neighbours of chunks of 16 tokens, expected chunks of "
        "model.retro.chunk=8. Fix: make them: megafab data retrieval path=corpus chunk=8 "
        f"name={Path(neighbors()).name} overwrite=true",
    ),
    (
        *("retro-neighbors", {**retro(), "data.retrieval": "nothing"}, 1),
        "data.retrieval=nothing: found no such directory (corpus/neighbors/nothing), expected a finished "
        "megafab-neighbors. Fix: make them: megafab data retrieval path=corpus chunk=16 name=nothing",
    ),
    (
        *("retro-context", {**retro(), "parallel.context": 2}, 2),
        "parallel.context=2: found model.retro.chunk=16, expected whole sequences: a chunk's neighbours are "
        "looked at by the next chunk, on another rank. Fix: parallel.context=1",
    ),
    (
        *("techniques-with-retro", {**retro(), "techniques.token_dropping": DROPPING}, 1),
        "technique=[token_dropping]: found model.retro.chunk=16, expected a model that looks at no "
        "neighbours. Fix: take token_dropping out, or model.retro.chunk=0",
    ),
    (
        *("techniques-with-retro", {**retro(in_context=True, retrieved=16), **indexed()}, 1),
        "technique=[curriculum]: found model.retro.in_context=true, expected rows that are windows alone, as "
        "what it reads was made for. Fix: take curriculum out, or model.retro.in_context=false",
    ),
    (
        *("freezing", {"techniques.freezing": FreezingConfig(["*cross*", "*norm*"])}, 1),
        "techniques.freezing.trained=[*cross*, *norm*]: found no parameter *cross*, expected patterns of "
        "names of parameters. Fix: a name from megafab ckpt inspect, with * for anything; retrieval needs "
        "model.retro.chunk",
    ),
    (
        *("freezing", {"techniques.freezing": FreezingConfig(["*"])}, 1),
        "techniques.freezing.trained=[*]: found every parameter, expected some that are trained and some "
        "that are not. Fix: leave freezing out",
    ),
    (
        *("freezing", {"techniques.freezing": FreezingConfig()}, 1),
        "techniques.freezing.trained=[]: found nothing left to train, expected some that are trained and "
        "some that are not. Fix: give names",
    ),
    (
        *("freezing", {"techniques.freezing": FreezingConfig(["*norm*"]), **MUON}, 1),
        "technique=[freezing]: found optim.name=muon, expected an optimizer of single elements: one of "
        "matrices lets all of them decay. Fix: optim=adamw",
    ),
    (
        *("size", spikes(patience=0), 1),
        "resilience.spikes.patience=0: found 0, expected at least 1. "
        "Fix: resilience.spikes.patience=1 or more",
    ),
    (
        *("range", spikes(threshold=0.0), 1),
        "resilience.spikes.threshold=0: found 0, expected more than 0. "
        "Fix: give resilience.spikes.threshold a value more than 0",
    ),
    (
        *("spikes-history", spikes(window=32), 1),
        "resilience.spikes.min_steps=64: found 64, expected at most resilience.spikes.window=32, which is "
        "all that is remembered. Fix: resilience.spikes.min_steps=32",
    ),
    (
        *("spikes-history", spikes(min_steps=5), 1),
        "resilience.spikes.min_steps=5: found 5, expected at least twice resilience.spikes.patience=3, to "
        "keep its median in place. Fix: resilience.spikes.min_steps=6 or more",
    ),
    (
        *("spikes-history", {**spikes(), "train.max_skipped": 2}, 1),
        "resilience.spikes.patience=3: found 3, expected at most train.max_skipped=2, which would end the "
        "run first. Fix: resilience.spikes.patience=2, or a larger train.max_skipped",
    ),
    (
        *("spikes-checkpoints", {**spikes(), "checkpoint.every": 0}, 1),
        "resilience.spikes: found checkpoint.every=0, expected checkpoints to go back to. "
        "Fix: checkpoint.every=103, for example",
    ),
    (
        *("spikes-checkpoints", {**spikes(), "checkpoint.every": 50, "checkpoint.keep": 3}, 1),
        "checkpoint.keep=3 checkpoint.every=50: found checkpoints of the last 100 steps, expected 103 or "
        "more, resilience.spikes.margin=100 and the patience of 3. Fix: checkpoint.keep=4, or a smaller "
        "resilience.spikes.margin",
    ),
    (
        *("skip", {"data.skip": ((8, 8), (8,))}, 1),
        "data.skip=[[8, 8], [8]]: found [8], expected [first, count] of samples, from 0 on and at least one. "
        "Fix: data.skip=[[1000,64]] passes over samples 1000 to 1063",
    ),
    (
        *("skip", {"data.skip": ((-1, 8),)}, 1),
        "data.skip=[[-1, 8]]: found [-1, 8], expected [first, count] of samples, from 0 on and at least one. "
        "Fix: data.skip=[[1000,64]] passes over samples 1000 to 1063",
    ),
    (
        *("skip", {"data.skip": ((8, 0),)}, 1),
        "data.skip=[[8, 0]]: found [8, 0], expected [first, count] of samples, from 0 on and at least one. "
        "Fix: data.skip=[[1000,64]] passes over samples 1000 to 1063",
    ),
    (
        *("skip", {"data.skip": ((10, 5),), "data.block": 4}, 1),
        "data.skip=[[10, 5]]: found [10, 5], expected whole blocks of data.block=4 samples, for steps to "
        "have whole ones. Fix: give [8,8]",
    ),
    (
        "size",
        {"model.layers": 0},
        1,
        "model.layers=0: found 0, expected at least 1. Fix: model.layers=1 or more",
    ),
    (
        *("size", {"eval.samples": -1}, 1),
        "eval.samples=-1: found -1, expected at least 0. Fix: eval.samples=0 or more",
    ),
    (
        *("size", {"techniques.ema": EMAConfig(every=0)}, 1),
        "techniques.ema.every=0: found 0, expected at least 1. Fix: techniques.ema.every=1 or more",
    ),
    (
        *("range", {"optim.lr": 0.0}, 1),
        "optim.lr=0: found 0, expected more than 0. Fix: give optim.lr a value more than 0",
    ),
    (
        *("range", {"schedule.warmup": math.nan}, 1),
        "schedule.warmup=nan: found nan, expected 0 or more. Fix: give schedule.warmup a value 0 or more",
    ),
    (
        *("range", {"schedule.decay": math.inf, "schedule.kind": ScheduleKind.wsd}, 1),
        "schedule.decay=inf: found inf, expected 0 or more. Fix: give schedule.decay a value 0 or more",
    ),
    (
        *("range", {"optim.beta2": 1.0}, 1),
        "optim.beta2=1: found 1, expected at least 0 and below 1. "
        "Fix: give optim.beta2 a value at least 0 and below 1",
    ),
    (
        *("range", {"schedule.min_ratio": float("nan")}, 1),
        "schedule.min_ratio=nan: found nan, expected between 0 and 1. "
        "Fix: give schedule.min_ratio a value between 0 and 1",
    ),
    (
        *("range", {"optim.clip": -0.5}, 1),
        "optim.clip=-0.5: found -0.5, expected 0 or more. Fix: give optim.clip a value 0 or more",
    ),
    (
        *("technique-range", {"techniques.ema": EMAConfig(decay=1.0)}, 1),
        "techniques.ema.decay=1: found 1, expected at least 0 and below 1. "
        "Fix: give techniques.ema.decay a value at least 0 and below 1",
    ),
    (
        *("size", {"techniques.token_dropping": dataclasses.replace(DROPPING, round_to=0)}, 1),
        "techniques.token_dropping.round_to=0: found 0, expected at least 1. "
        "Fix: techniques.token_dropping.round_to=1 or more",
    ),
    (
        *("technique-range", {"techniques.token_dropping": dataclasses.replace(DROPPING, steps=0.0)}, 1),
        "techniques.token_dropping.steps=0: found 0, expected more than 0. "
        "Fix: give techniques.token_dropping.steps a value more than 0",
    ),
    (
        *("whole-steps", {"techniques.token_dropping": dataclasses.replace(DROPPING, steps=7.4)}, 1),
        "techniques.token_dropping.steps=7.4: found 7.4, expected a share of the run (below 1) or whole "
        "steps. Fix: techniques.token_dropping.steps=7",
    ),
    (
        *("token-dropping-layers", {"techniques.token_dropping": DROPPING, "model.layers": 2}, 1),
        "techniques.token_dropping.layers=null: found model.layers=2, of which the first and the last are "
        "kept whole, expected a layer between them to drop tokens. "
        "Fix: give techniques.token_dropping.layers a list of layers, from 0 to 1",
    ),
    (
        *(
            "token-dropping-layers",
            {"techniques.token_dropping": dataclasses.replace(DROPPING, layers=())},
            1,
        ),
        "techniques.token_dropping.layers=[]: found none, expected a layer to drop tokens. Fix: give "
        "techniques.token_dropping.layers a list of layers, from 0 to 7; or leave the technique out",
    ),
    (
        "token-dropping-layers",
        {"techniques.token_dropping": dataclasses.replace(DROPPING, layers=(-1, 2, 8))},
        1,
        "techniques.token_dropping.layers=[-1, 2, 8]: found layer -1, layer 8, expected layers of a model of "
        "model.layers=8. Fix: give techniques.token_dropping.layers a list of layers, from 0 to 7",
    ),
    (
        "token-dropping-layers",
        {"techniques.token_dropping": dataclasses.replace(DROPPING, layers=(2, 2))},
        1,
        "techniques.token_dropping.layers=[2, 2]: found a layer more than once, expected every layer once. "
        "Fix: give techniques.token_dropping.layers a list of layers, from 0 to 7",
    ),
    (
        "token-dropping-start",
        {"techniques.token_dropping": dataclasses.replace(DROPPING, start=32)},
        1,
        "techniques.token_dropping.start=32: found 32, expected less than model.seq_len=32: nothing would be "
        "dropped. Fix: lower techniques.token_dropping.start, or leave the technique out",
    ),
    (
        "token-dropping-start",
        {"techniques.token_dropping": dataclasses.replace(DROPPING, start=13)},
        1,
        "techniques.token_dropping.start=13: found 13 % 4 = 1, expected a multiple of "
        "techniques.token_dropping.round_to=4. "
        "Fix: techniques.token_dropping.start=16, or another round_to",
    ),
    (
        "token-dropping-sequence",
        {
            "techniques.token_dropping": dataclasses.replace(DROPPING, round_to=2),
            "parallel.tensor": 4,
            "parallel.sequence": True,
        },
        4,
        "techniques.token_dropping.round_to=2: found 2, expected a multiple of parallel.tensor=4, over which "
        "parallel.sequence splits. Fix: techniques.token_dropping.round_to=4, or parallel.sequence=false",
    ),
    (
        *("token-dropping-context", {"techniques.token_dropping": DROPPING, "parallel.context": 2}, 2),
        "technique.token_dropping: found parallel.context=2, expected whole sequences on a rank: which "
        "tokens are kept would leave context ranks with unequal parts. "
        "Fix: parallel.context=1, or leave token_dropping out",
    ),
    (
        *("token-dropping-experts", {"techniques.token_dropping": DROPPING, "model.moe.experts": 4}, 1),
        "technique.token_dropping: found model.moe.experts=4, expected a model without experts: their load "
        "would be balanced over the kept tokens alone. Fix: model.moe.experts=0, or leave token_dropping out",
    ),
    (
        *("schedule-keys", {"schedule.decay": 0.2}, 1),
        "schedule.decay=0.2: found schedule.kind=cosine, expected null, since cosine has no such phase. "
        "Fix: schedule.decay=null, or a schedule that has it",
    ),
    (
        *("schedule-keys", {"schedule.kind": ScheduleKind.wsd}, 1),
        "schedule.kind=wsd: found no schedule.decay, expected one. "
        "Fix: schedule=wsd, whose preset has them all",
    ),
    (
        *(
            "schedule-keys",
            {
                "schedule.kind": ScheduleKind.wsd,
                "schedule.decay": 0.2,
                "schedule.decay_shape": Fall.exponential,
                "schedule.min_ratio": 0.0,
            },
            1,
        ),
        "schedule.decay_shape=exponential: found schedule.min_ratio=0, expected more than 0: it only "
        "multiplies. Fix: schedule.min_ratio=0.01, or another shape",
    ),
    (
        *("technique-length", {"techniques.online_mixing": OnlineMixingConfig(warmup_steps=100)}, 1),
        "techniques.online_mixing.warmup_steps=100: found 100, expected less than the 100 steps of the run, "
        "for the technique to act. Fix: techniques.online_mixing.warmup_steps=2, for example",
    ),
    (
        *("online-mixing", {"techniques.online_mixing": OnlineMixingConfig(exploration_floor=0.5)}, 1),
        "techniques.online_mixing.exploration_floor=0.5: found 0.5, expected less than 1 over the 2 domains "
        "that are mixed. Fix: techniques.online_mixing.exploration_floor=0",
    ),
    (
        *("replay", {"techniques.replay": ReplayConfig(domains=["books", "books"])}, 1),
        "techniques.replay.domains=[books, books]: found a domain more than once, expected each once. "
        "Fix: leave out what is double",
    ),
    (
        *(
            "counted-tokens",
            {"train.count": Count.layer_tokens, "train.steps": None, "train.tokens": 9000},
            1,
        ),
        "train.count=layer_tokens: found no layer that drops tokens, expected "
        "technique=[token_dropping], which makes the difference. Fix: leave train.count out",
    ),
    (
        *("counted-tokens", {"train.count": Count.layer_tokens}, 1),
        "train.count=layer_tokens: found train.steps=100, expected train.tokens, which it says how to count. "
        "Fix: train.tokens in place of train.steps, or leave train.count out",
    ),
    (
        *("technique-range", sequences(shape=PacingShape.root, degree=0.0), 1),
        "techniques.sequence_curriculum.pacing.degree=0: found 0, expected more than 0. "
        "Fix: give techniques.sequence_curriculum.pacing.degree a value more than 0",
    ),
    (
        *("pacing-keys", sequences(shape=PacingShape.root), 1),
        "techniques.sequence_curriculum.pacing.degree: found nothing, expected a value, for "
        "techniques.sequence_curriculum.pacing.shape=root. "
        "Fix: give techniques.sequence_curriculum.pacing.degree a value",
    ),
    (
        *("pacing-keys", sequences(degree=2.0), 1),
        f"{SEQUENCES}.degree: found {SEQUENCES}.shape=linear, expected no value: it takes start, end, steps. "
        f"Fix: {SEQUENCES}.degree=null, or {SEQUENCES}.shape=root",
    ),
    (
        *("pacing-keys", sequences(start=None, end=None, steps=None, **STEPS), 1),
        f"{SEQUENCES}.round_to=8: found {SEQUENCES}.shape=step, expected levels as they are. "
        f"Fix: leave {SEQUENCES}.round_to out",
    ),
    (
        *("pacing", sequences(steps=0), 1),
        "techniques.sequence_curriculum.pacing.steps=0: found 0, expected at least 1. "
        "Fix: techniques.sequence_curriculum.pacing.steps=1000",
    ),
    (
        *("pacing", sequences(start=math.inf), 1),
        "techniques.sequence_curriculum.pacing.start=inf: found inf, expected a number. "
        "Fix: give techniques.sequence_curriculum.pacing.start numbers",
    ),
    (
        *("pacing", sequences(start=24, end=16), 1),
        "techniques.sequence_curriculum.pacing.start=24: found 16 after it, "
        "expected no less: a difficulty never falls. Fix: give them from the easiest to the hardest",
    ),
    (
        *(
            "pacing",
            sequences(start=None, end=None, steps=None, round_to=1.0, **{**STEPS, "last_steps": (5,)}),
            1,
        ),
        "techniques.sequence_curriculum.pacing.last_steps=[5]: found 1 for 3 levels, "
        "expected one for each level but the last. Fix: give techniques.sequence_curriculum.pacing.levels "
        "one entry more than techniques.sequence_curriculum.pacing.last_steps",
    ),
    (
        *(
            "pacing",
            sequences(start=None, end=None, steps=None, round_to=1.0, **{**STEPS, "last_steps": (5, 5)}),
            1,
        ),
        "techniques.sequence_curriculum.pacing.last_steps=[5, 5]: found [5, 5], "
        "expected growing numbers from 1 on. Fix: give them in order",
    ),
    (
        *("pacing", sequences(shape=PacingShape.custom, steps=None, function="mine.py"), 1),
        "techniques.sequence_curriculum.pacing.function=mine.py: found no name of a function, "
        "expected package.module:function. Fix: name it as package.module:function",
    ),
    (
        "curriculum-percent",
        {"techniques.curriculum": CurriculumConfig(index(), pacing=dataclasses.replace(PACING, end=101.0))},
        1,
        "techniques.curriculum.pacing.end=101: found 101, expected more than 0 and at most 100 percent. "
        "Fix: give percent, or techniques.curriculum.kind=threshold",
    ),
    (
        *("curriculum-index", curriculum(), 1),
        "techniques.curriculum.difficulty=none: found no such directory (corpus/difficulty/none), "
        "expected a finished megafab-difficulty. "
        "Fix: make one: megafab data difficulty path=corpus seq_len=32 metric=rarity",
    ),
    (
        *("sequence-curriculum-length", sequences(end=40), 1),
        "techniques.sequence_curriculum.pacing.end=40: found 40, "
        "expected a whole number from 1 to model.seq_len=32. "
        "Fix: give techniques.sequence_curriculum.pacing.end such a number",
    ),
    (
        *("sequence-curriculum-length", sequences(round_to=1.0) | {"parallel.context": 2}, 2),
        "techniques.sequence_curriculum.pacing.round_to=1: found 1, expected a whole number from 1 to "
        "model.seq_len=32 that is a multiple of 4, to be split over parallel.context=2 (allgather). "
        "Fix: give techniques.sequence_curriculum.pacing.round_to such a number",
    ),
    (
        *("head-size", {"model.hidden": 68, "model.position": Position.learned}, 1),
        "model.hidden=68: found 68 % 8 = 4, expected a multiple of model.heads=8. "
        "Fix: change model.heads, or set model.head_dim",
    ),
    (
        *("rope-head-size", {"model.head_dim": 7}, 1),
        "model.head_dim=7: found heads of size 7, expected an even size: rope rotates pairs. "
        "Fix: choose an even head size, or model.position=learned",
    ),
    (
        *("grouped-query", {"model.kv_heads": 3}, 1),
        "model.heads=8: found 8 % 3 = 2, expected a multiple of model.kv_heads=3. Fix: change model.kv_heads",
    ),
    (
        *("moe-top-k", {"model.moe.experts": 2, "model.moe.top_k": 3}, 1),
        "model.moe.top_k=3: found 3, expected at most model.moe.experts=2. Fix: model.moe.top_k=2 or less",
    ),
    (
        *("moe-off", {"model.moe.shared_ffn": 64}, 1),
        "model.moe.shared_ffn=64: found a model without experts, expected experts. "
        "Fix: set model.moe.experts, or leave model.moe.shared_ffn out",
    ),
    (
        *("moe-bias", {"model.moe.experts": 4, "model.bias": True}, 1),
        "model.bias=true: found a model with experts, expected model.bias=false: Megatron does not train "
        "experts with biases. Fix: model.bias=false",
    ),
    (
        *("keep-every", {"checkpoint.keep_every": 250, "checkpoint.every": 100}, 1),
        "checkpoint.keep_every=250: found checkpoint.every=100, expected a multiple of checkpoint.every: "
        "other steps are not saved. Fix: checkpoint.keep_every=300, or another checkpoint.every",
    ),
    (
        *("keep-every", {"checkpoint.keep_every": 10}, 1),
        "checkpoint.keep_every=10: found checkpoint.every=0, expected a multiple of checkpoint.every: "
        "other steps are not saved. Fix: set checkpoint.every, or leave checkpoint.keep_every out",
    ),
    (
        *("start-ratio", {"schedule.start_ratio": 0.1, "schedule.warmup": 0}, 1),
        "schedule.start_ratio=0.1: found schedule.warmup=0, expected a warm-up to begin there. Fix: "
        "schedule.start_ratio=0, or a warm-up",
    ),
    (
        *("start", {"start.optimizer": Carry.keep}, 1),
        "start.optimizer=keep: found no start.checkpoint, expected a checkpoint to keep it from. Fix: set "
        "start.checkpoint, or leave it out",
    ),
    (
        *("start", {"start.checkpoint": "runs/a", "checkpoint.resume": "runs/b"}, 1),
        "start.checkpoint=runs/a checkpoint.resume=runs/b: found two checkpoints, expected one of them. Fix: "
        "start.checkpoint begins a new run, checkpoint.resume goes on with one: leave one out",
    ),
    (
        *("data-change", {"checkpoint.allow_data_change": True, "checkpoint.resume": "none"}, 1),
        "checkpoint.allow_data_change=true: found checkpoint.resume=none, expected a checkpoint whose data "
        "could differ. Fix: leave checkpoint.allow_data_change out",
    ),
    (
        *("run-place", {"run.name": ""}, 1),
        "run.name=: found nothing, expected a name, under which the run is kept. Fix: give run.name a name",
    ),
    (
        *("ranks", {"parallel.tensor": 2, "parallel.pipeline": 2}, 6),
        "launch.ranks=6: found 6 ranks, expected a multiple of tensor 2 x pipeline 2 x context 1 = 4. "
        "Fix: run 8 ranks, or lower one of parallel.tensor, parallel.pipeline, parallel.context",
    ),
    (
        *("launcher", {"launch.ranks": 4}, 2),
        "launch.ranks=4: found 2 ranks started by torchrun or srun, expected the same number. "
        "Fix: leave launch.ranks out, or have 4 ranks started",
    ),
    (
        *("stall-before-timeout", {"launch.timeout_minutes": 10}, 2),
        "resilience.stall_seconds=600: found 600 s, expected less than launch.timeout_minutes=10, after "
        "which the collectives give up unexplained. Fix: resilience.stall_seconds=200, or a longer "
        "launch.timeout_minutes",
    ),
    (
        *("range", {"resilience.stall_seconds": 0.0}, 1),
        "resilience.stall_seconds=0: found 0, expected more than 0. Fix: give resilience.stall_seconds a "
        "value more than 0",
    ),
    (
        *("range", {"resilience.straggler_ratio": 1.0}, 1),
        "resilience.straggler_ratio=1: found 1, expected more than 1. Fix: give resilience.straggler_ratio a "
        "value more than 1",
    ),
    (
        *("heads-by-tensor", {"parallel.tensor": 3, "model.kv_heads": 1, "model.vocab_multiple": 96}, 3),
        "model.heads=8: found 8 % 3 = 2, expected a multiple of parallel.tensor=3. Fix: change "
        "parallel.tensor",
    ),
    (
        *(
            "kv-heads-by-tensor",
            {"parallel.tensor": 4, "model.heads": 24, "model.kv_heads": 6, "model.hidden": 96},
            4,
        ),
        "model.kv_heads=6: found 6, expected a multiple or a divisor of parallel.tensor=4. "
        "Fix: change model.kv_heads or parallel.tensor",
    ),
    (
        *("ffn-by-tensor", {"parallel.tensor": 2, "model.ffn": 97}, 2),
        "model.ffn=97: found 97 % 2 = 1, expected a multiple of parallel.tensor=2. "
        "Fix: change it or parallel.tensor",
    ),
    (
        *("vocab-by-tensor", {"parallel.tensor": 4, "model.vocab_multiple": 2, "model.vocab": 1002}, 4),
        "model.vocab_multiple=2: found a vocabulary padded to 1002, expected a multiple of "
        "parallel.tensor=4. "
        "Fix: model.vocab_multiple=4",
    ),
    (
        *("layers-by-pipeline", {"parallel.pipeline": 2, "parallel.virtual_pipeline": 3}, 2),
        "model.layers=8: found 8 % 6 = 2, expected a multiple of parallel.pipeline=2 x "
        "parallel.virtual_pipeline=3. Fix: change one of them",
    ),
    (
        *("interleaving", {"parallel.virtual_pipeline": 2}, 1),
        "parallel.virtual_pipeline=2: found parallel.pipeline=1, expected at least 2 pipeline stages. "
        "Fix: parallel.virtual_pipeline=1, or more pipeline stages",
    ),
    (
        "interleaved-micro-batches",
        {
            "parallel.pipeline": 4,
            "parallel.virtual_pipeline": 2,
            "train.global_batch": 12,
            "train.micro_batch": 2,
        },
        4,
        "train.global_batch=12: found 6 micro-batches, expected a multiple of parallel.pipeline=4: "
        "the interleaved schedule needs it. Fix: train.global_batch=16, or parallel.virtual_pipeline=1",
    ),
    (
        *("sequence-parallel", {"parallel.sequence": True}, 1),
        "parallel.sequence=true: found parallel.tensor=1, expected parallel.tensor of 2 or more, "
        "over which to split sequences. Fix: parallel.sequence=false, or parallel.tensor=2 or more",
    ),
    (
        *("sequence-length", {"parallel.tensor": 2, "parallel.sequence": True, "model.seq_len": 33}, 2),
        "model.seq_len=33: found 33, expected a multiple of 2, to be split over "
        "parallel.tensor=2 (parallel.sequence). Fix: model.seq_len=34",
    ),
    (
        *("sequence-length", {"parallel.context": 4, "model.seq_len": 36}, 4),
        "model.seq_len=36: found 36, expected a multiple of 8, to be split over "
        "parallel.context=4 (allgather). Fix: model.seq_len=40",
    ),
    (
        "ulysses-heads",
        {"parallel.context": 2, "parallel.tensor": 4, "parallel.context_method": ContextMethod.ulysses},
        8,
        "model.kv_heads=4: found 1 a tensor rank, expected a multiple of parallel.context=2: ulysses splits "
        "heads. Fix: parallel.context_method=allgather, or a smaller parallel.context",
    ),
    (
        *("expert-without-moe", {"parallel.expert": 2}, 2),
        "parallel.expert=2: found a model without experts, expected experts to spread. "
        "Fix: parallel.expert=1, or a model with model.moe.experts",
    ),
    (
        *("experts-by-expert", {"parallel.expert": 4, "model.moe.experts": 6}, 4),
        "model.moe.experts=6: found 6 % 4 = 2, expected a multiple of parallel.expert=4. "
        "Fix: change parallel.expert",
    ),
    (
        *("expert-ranks", {"parallel.expert": 4, "model.moe.experts": 4, "parallel.pipeline": 2}, 4),
        "parallel.expert=4: found 4, expected a divisor of the 2 ranks of a pipeline stage. "
        "Fix: change it or the ranks",
    ),
    (
        *("moe-tensor-sequence", {"parallel.tensor": 2, "model.moe.experts": 4}, 2),
        "parallel.sequence=false: found parallel.tensor=2 with experts, expected sequence parallelism: "
        "Megatron does not train experts on a tensor axis without it. Fix: parallel.sequence=true",
    ),
    (
        "overlap-param-gather",
        {"engine.overlap_param_gather": True, "engine.overlap_grad_reduce": False},
        1,
        "engine.overlap_param_gather=true: found engine.overlap_grad_reduce=false, expected "
        "engine.overlap_grad_reduce=true. Fix: engine.overlap_grad_reduce=true, or "
        "engine.overlap_param_gather=false",
    ),
    (
        *("optim-options", {"optim.name": OptimName.lion}, 1),
        "optim.eps=1e-08: found optim.name=lion, expected no eps: Lion has none. Fix: optim.eps=null",
    ),
    (
        *("optim-options", {"optim.eps": None}, 1),
        "optim.eps=null: found nothing, expected a number, for optim.name=adamw. Fix: optim.eps=1e-8",
    ),
    (
        *("optim-options", {"optim.muon": MuonConfig()}, 1),
        "optim.muon: found optim.name=adamw, expected optim.name=muon, which they set. "
        "Fix: optim=muon, or leave optim.muon out",
    ),
    (
        *("optim-options", {"optim.name": OptimName.soap}, 1),
        "optim.name=soap: found optim.soap is null, expected its settings. "
        "Fix: choose optim=soap, which has them",
    ),
    (
        *("range", {"optim.name": OptimName.muon, "optim.muon": MuonConfig(momentum=1.0)}, 1),
        "optim.muon.momentum=1: found 1, expected at least 0 and below 1. "
        "Fix: give optim.muon.momentum a value at least 0 and below 1",
    ),
    (
        "whole-matrices",
        {"engine.name": EngineName.deepspeed, "engine.zero_stage": 1}
        | {"optim.name": OptimName.muon, "optim.muon": MuonConfig()},
        1,
        "engine.name=deepspeed optim.name=muon: found ZeRO, which deals parameters to ranks in flat ranges, "
        "expected an optimizer that updates every element on its own: adamw or lion. "
        "Fix: engine=megatron, which deals them to muon in whole matrices; or optim=adamw",
    ),
    (
        "whole-matrices-gather",
        {"engine.overlap_param_gather": True, "optim.name": OptimName.soap, "optim.soap": SOAPConfig()},
        1,
        "engine.overlap_param_gather=true: found optim.name=soap, expected adamw or lion: new matrices are "
        "sent to the other ranks at the end of the step. Fix: engine.overlap_param_gather=false",
    ),
    (
        *("head-chunk", {"train.head_chunk": 32}, 1),
        "train.head_chunk=32: found 32 tokens, expected fewer than the 32 of a micro-batch on a rank. "
        "Fix: train.head_chunk=8, or null",
    ),
    (
        *("global-batch", {"train.global_batch": 10, "train.micro_batch": 2}, 4),
        "train.global_batch=10: found 10 sequences, expected a multiple of train.micro_batch=2 x "
        "4 data parallel ranks. Fix: train.global_batch=16, or another train.micro_batch",
    ),
    (
        "global-batch",
        {"train.batch_ramp.start": 4, "train.batch_ramp.increment": 2, "train.batch_ramp.samples": 9}
        | {"train.micro_batch": 4},
        1,
        "train.batch_ramp.increment=2: found 2 sequences, expected a multiple of train.micro_batch=4 x "
        "1 data parallel ranks. Fix: train.batch_ramp.increment=4, or another train.micro_batch",
    ),
    (
        *("batch-ramp", {"train.batch_ramp.start": 4}, 1),
        "train.batch_ramp.start=4: found no train.batch_ramp.increment, no train.batch_ramp.samples, "
        "expected "
        "start, increment and samples. Fix: set train.batch_ramp.increment and train.batch_ramp.samples, "
        "or none "
        "of the three",
    ),
    (
        "batch-ramp",
        {"train.batch_ramp.start": 3, "train.batch_ramp.increment": 2, "train.batch_ramp.samples": 9},
        1,
        "train.batch_ramp.start=3: found 3 plus steps of 2, expected to arrive at train.global_batch=8. "
        "Fix: choose start + n x increment = train.global_batch",
    ),
    (
        *("run-length", {"train.steps": None}, 1),
        "train.steps, train.tokens: found neither, expected exactly one of them. Fix: add "
        "train.steps=1000, say",
    ),
    (
        *("run-length", {"train.tokens": 10}, 1),
        "train.steps, train.tokens: found both, expected exactly one of them. Fix: set one of them to null",
    ),
    (
        *("schedule-length", {"schedule.warmup": 101.0}, 1),
        "schedule.warmup=101: found 101 steps of warm-up, expected no more than the run's 100 steps. "
        "Fix: shorten them, or give them as shares of the run (below 1)",
    ),
    (
        "schedule-length",
        # 40 steps of 8 sequences of 32 tokens.
        {"train.steps": None, "train.tokens": 40 * 8 * 32, "schedule.kind": ScheduleKind.wsd}
        | {"schedule.warmup": 21.0, "schedule.decay": 0.5},
        1,
        "schedule.warmup=21 schedule.decay=0.5: found 21 steps of warm-up and 20 steps of decay, expected "
        "no more "
        "than the run's 40 steps. Fix: shorten them, or give them as shares of the run (below 1)",
    ),
    (
        # A warm-up is at least one step.
        "schedule-length",
        {"schedule.kind": ScheduleKind.wsd, "schedule.warmup": 0.0, "schedule.decay": 100.0},
        1,
        "schedule.warmup=0 schedule.decay=100: found 1 steps of warm-up and 100 steps of decay, expected no "
        "more than the run's 100 steps. Fix: shorten them, or give them as shares of the run (below 1)",
    ),
    (
        *("whole-steps", {"schedule.warmup": 2.5}, 1),
        "schedule.warmup=2.5: found 2.5, expected a share of the run (below 1) or whole steps. "
        "Fix: schedule.warmup=2",
    ),
    (
        *("eval-samples", {"eval.every": 5, "eval.samples": 0}, 1),
        "eval.every=5: found eval.samples=0, expected samples to evaluate on. Fix: eval.samples=64, or "
        "eval.every=0",
    ),
    (
        *("vocab-of-tokenizer", {"model.vocab": 999}, 1),
        "model.vocab=999: found 999, expected the 1000 of the tokenizer in data.path=corpus, or a little "
        "more. "
        "Fix: model.vocab=null takes the tokenizer's",
    ),
    (
        *("vocab-of-tokenizer", {"model.vocab": 1024 + 1024 + 1}, 1),
        "model.vocab=2049: found 2049, expected the 1000 of the tokenizer in data.path=corpus, or a little "
        "more. "
        "Fix: model.vocab=null takes the tokenizer's",
    ),
    (
        *("temperature", {"data.mixture": {"books": 1.0}, "data.temperature": 0.5}, 1),
        "data.temperature=0.5: found data.mixture, which gives the weights itself, "
        "expected data.mixture=null. Fix: leave one of the two out",
    ),
    (
        *("mixture-block", {"data.block": 3}, 1),
        "data.block=3: found train.global_batch=8, expected whole blocks in every step. "
        "Fix: data.block=1, or train.global_batch=9",
    ),
    (
        *("technique-range", {"techniques.online_mixing": OnlineMixingConfig(every=0)}, 1),
        "techniques.online_mixing.every=0: found 0, expected more than 0. Fix: give "
        "techniques.online_mixing.every a value more than 0",
    ),
    (
        *(
            "one-mixing-policy",
            {
                "techniques.online_mixing": OnlineMixingConfig(),
                "techniques.dynamic_loading": DynamicLoadingConfig(reference={"books": 1.0, "code": 1.0}),
                "eval.every": 10,
            },
            1,
        ),
        "technique=[online_mixing,dynamic_loading]: found two that decide the mixture, expected one "
        "technique that decides the mixture. Fix: take one of the two out",
    ),
    (
        *("online-mixing", {"techniques.online_mixing": OnlineMixingConfig(reward=Reward.excess)}, 1),
        "techniques.online_mixing.reward=excess: found no reference losses, expected both, or "
        "neither. Fix: give techniques.online_mixing.reference={domain: loss, ...} with "
        "techniques.online_mixing.reward=excess, or neither",
    ),
    (
        *("online-mixing", {"techniques.online_mixing": OnlineMixingConfig(reference={"books": 1.0})}, 1),
        "techniques.online_mixing.reward=null: found reference losses that nothing reads, expected "
        "both, or neither. Fix: give techniques.online_mixing.reference={domain: loss, ...} with "
        "techniques.online_mixing.reward=excess, or neither",
    ),
    (
        *(
            "online-mixing",
            {"techniques.online_mixing": OnlineMixingConfig(reward=Reward.excess, reference={"books": 1.0})},
            1,
        ),
        "techniques.online_mixing.reference: found no loss for code, expected one a domain. Fix: add "
        "code to it",
    ),
    (
        *("online-mixing", {"techniques.online_mixing": OnlineMixingConfig(reward_scale=2.0)}, 1),
        "techniques.online_mixing.reward_scale=2: found techniques.online_mixing.mode=released, "
        "expected 1, since only the shares of rewards count there. Fix: leave "
        "techniques.online_mixing.reward_scale out, or techniques.online_mixing.mode=paper",
    ),
    (
        *(
            "online-mixing",
            {
                "techniques.online_mixing": OnlineMixingConfig(
                    reward=Reward.excess, reference={"books": 1.0, "code": 1.0, "cod": 2.0}
                )
            },
            1,
        ),
        "techniques.online_mixing.reference: found cod, expected domains of data.path=corpus: books, "
        "code. Fix: did you mean code?",
    ),
    (
        *(
            "dynamic-loading",
            {"techniques.dynamic_loading": DynamicLoadingConfig(reference={"books": 1.0, "code": 1.0})},
            1,
        ),
        "technique=[dynamic_loading]: found eval.every=0 eval.samples=64, expected evaluations, after"
        " each of which the mixture is decided. Fix: eval.every=400 eval.samples=64",
    ),
    (
        *(
            "dynamic-loading",
            {
                "techniques.dynamic_loading": DynamicLoadingConfig(
                    reference={"books": 1.0, "code": 1.0}, fit_sizes=[1.0]
                ),
                "eval.every": 10,
            },
            1,
        ),
        "techniques.dynamic_loading.fit_sizes: found no techniques.dynamic_loading.fit_losses, "
        "expected both, or neither. Fix: three sizes, and three losses for each domain",
    ),
    (
        *(
            "dynamic-loading",
            {
                "techniques.dynamic_loading": DynamicLoadingConfig(
                    reference={"books": 1.0, "code": 1.0},
                    fit_sizes=[1.0, 2.0, 3.0],
                    fit_losses={"code": [3.0, 2.0, 1.5]},
                ),
                "eval.every": 10,
            },
            1,
        ),
        "techniques.dynamic_loading.reference: found code in fit_losses too, expected one for each "
        "domain. Fix: give each domain one of the two",
    ),
    (
        *("replay", {"techniques.replay": ReplayConfig(domains=["book"])}, 1),
        "techniques.replay.domains: found book, expected domains of data.path=corpus: books, code. "
        "Fix: did you mean books?",
    ),
    (
        *("replay", {"techniques.replay": ReplayConfig(domains=[])}, 1),
        "techniques.replay.domains=[]: found no domain, expected the domains of the earlier training."
        " Fix: techniques.replay.domains=[name]",
    ),
    (
        *("replay", {"techniques.replay": ReplayConfig(domains=["books"]), "data.mixture": {"code": 1.0}}, 1),
        "techniques.replay.domains=[books]: found no weight for any of them in data.mixture, expected"
        " old domains and new ones, both with a weight. Fix: give both a weight in data.mixture; only"
        " its proportions inside each group count",
    ),
    (
        *("replay", {"techniques.replay": ReplayConfig(domains=["books", "code"])}, 1),
        "techniques.replay.domains=[books, code]: found no weight for any other domain in "
        "data.mixture, expected old domains and new ones, both with a weight. Fix: give both a weight"
        " in data.mixture; only its proportions inside each group count",
    ),
    (
        *(
            "sample-reweighting",
            {"techniques.sample_reweighting": SampleReweightingConfig(warmup_steps=0)},
            1,
        ),
        "techniques.sample_reweighting.over=micro_batch: found train.micro_batch=1 on 1 data parallel"
        " rank, expected at least 2 samples that are weighed together; one alone always counts as it "
        "is. Fix: a larger train.micro_batch, or techniques.sample_reweighting.over=batch",
    ),
    (
        *(
            "sample-reweighting",
            {
                "techniques.sample_reweighting": SampleReweightingConfig(
                    warmup_steps=0, start_temperature=100.0
                ),
                "train.micro_batch": 2,
            },
            1,
        ),
        "techniques.sample_reweighting.temperature_steps=0: found "
        "techniques.sample_reweighting.start_temperature=100.0, expected both, or neither. Fix: give "
        "both to move the temperature, or neither",
    ),
    (
        *("token-selection", {"techniques.token_selection": TokenSelectionConfig(reference="ref")}, 1),
        "techniques.token_selection.reference=ref: found no such directory at corpus/scores/ref, "
        "expected a finished megafab-scores. Fix: make it: megafab score",
    ),
    (
        *("size", {"techniques.gradual_pruning": GradualPruningConfig(every=0)}, 1),
        "techniques.gradual_pruning.every=0: found 0, expected at least 1. Fix: "
        "techniques.gradual_pruning.every=1 or more",
    ),
    (
        *("technique-range", {"techniques.static_sparsity": StaticSparsityConfig(sparsity=1.0)}, 1),
        "techniques.static_sparsity.sparsity=1: found 1, expected more than 0 and below 1. Fix: give "
        "techniques.static_sparsity.sparsity a value more than 0 and below 1",
    ),
    (
        *("technique-range", {"techniques.static_sparsity": StaticSparsityConfig(seed=-1)}, 1),
        "techniques.static_sparsity.seed=-1: found -1, expected 0 or more. Fix: give "
        "techniques.static_sparsity.seed a value 0 or more",
    ),
    (
        *("technique-range", {"techniques.gradual_pruning": GradualPruningConfig(end=1.0, every=1)}, 1),
        "techniques.gradual_pruning.end=1: found 1, expected more than 0 and below 1. Fix: give "
        "techniques.gradual_pruning.end a value more than 0 and below 1",
    ),
    (
        "one-sparsity",
        {
            "techniques.static_sparsity": StaticSparsityConfig(),
            "techniques.gradual_pruning": GradualPruningConfig(every=10),
        },
        1,
        "technique=[static_sparsity,gradual_pruning]: found two that mask weights, expected one technique "
        "that decides which weights are 0. Fix: take one of the two out",
    ),
    (
        *("two-four", {"techniques.static_sparsity": StaticSparsityConfig(TWO_FOUR, sparsity=0.75)}, 1),
        "techniques.static_sparsity.sparsity=0.75: found techniques.static_sparsity.pattern=two_four, "
        "expected 0.5, which is two of four. Fix: techniques.static_sparsity.sparsity=null, or "
        "techniques.static_sparsity.pattern=unstructured",
    ),
    (
        *("two-four", {"techniques.static_sparsity": StaticSparsityConfig(TWO_FOUR), "model.ffn": 98}, 1),
        "model.ffn=98: found 98 % 4 = 2, expected groups of 4, for "
        "techniques.static_sparsity.pattern=two_four. Fix: change model.ffn, or "
        "techniques.static_sparsity.pattern=unstructured",
    ),
    (
        "gradual-pruning",
        {"techniques.gradual_pruning": GradualPruningConfig(begin=0.5, end=0.5, every=10)},
        1,
        "techniques.gradual_pruning.begin=0.5: found techniques.gradual_pruning.end=0.5, expected a ramp "
        "that ends after it begins. Fix: lower techniques.gradual_pruning.begin or raise "
        "techniques.gradual_pruning.end",
    ),
    (
        *("gradual-pruning", {"techniques.gradual_pruning": GradualPruningConfig(every=26)}, 1),
        "techniques.gradual_pruning.every=26: found 26, expected at most 25, the steps after the ramp: the "
        "last pruning would come too late. Fix: techniques.gradual_pruning.every=25 or less",
    ),
    (
        *("mixture-domains", {"data.mixture": {"book": 1.0}}, 1),
        "data.mixture.book=1: found book, expected a domain of data.path=corpus: books, code. "
        "Fix: did you mean data.mixture.books?",
    ),
    (
        *("mixture-weights", {"data.mixture": {"books": 1.0, "code": -1.0}}, 1),
        "data.mixture.code=-1: found -1, expected 0 or more. Fix: give it a weight of 0 or more",
    ),
    (
        *("mixture-weights", {"data.mixture": {"books": 1e308, "code": 1e308}}, 1),
        "data.mixture: found weights too large to add up, expected numbers like shares. Fix: scale them down",
    ),
    (
        *("mixture-weights", {"data.mixture": {"books": 0.0}}, 1),
        "data.mixture: found no weight above 0, expected at least one. "
        "Fix: give a domain a weight above 0, or data.mixture=null for weights by tokens",
    ),
    (
        *("domain-length", {"model.seq_len": 900}, 1),
        "data.path=corpus: found 900 tokens in domain code, expected at least model.seq_len + 1 = 901 in "
        "each "
        "domain that is read. Fix: data.mixture without code, more text in it, or a smaller model.seq_len",
    ),
]


ZERO = {"engine.name": EngineName.deepspeed}
BROKEN += [
    (
        *("engine-capabilities", ZERO, 1),
        "engine.zero_stage=null: found null, engine=deepspeed, expected a stage of ZeRO. "
        "Fix: engine.zero_stage=1, 2 or 3",
    ),
    (
        *("engine-capabilities", ZERO | {"engine.zero_stage": 0}, 1),
        "engine=deepspeed engine.zero_stage=0: found ZeRO 0: without sharding ZeRO is plain data "
        "parallelism, which DeepSpeed does not run under other schedules, expected what is shown to train "
        "right (README, engines). Fix: engine=megatron, whose optimizer is sharded as in ZeRO 1, or "
        "engine.zero_stage=1",
    ),
    (
        *("engine-capabilities", ZERO | {"engine.zero_stage": 3, "parallel.pipeline": 2}, 2),
        "engine=deepspeed engine.zero_stage=3: found ZeRO 3 with pipeline: DeepSpeed wants every rank of the "
        "job to hold the same parameters, which pipeline stages do not, expected what is shown to train "
        "right (README, engines). Fix: engine.zero_stage=2, or parallel.pipeline=1",
    ),
    (
        *("engine-capabilities", ZERO | {"engine.zero_stage": 2, "engine.offload": Offload.parameters}, 1),
        "engine=deepspeed engine.zero_stage=2 engine.offload=parameters: found ZeRO 2, offload parameters: "
        "only stage 3 partitions parameters, so only there they can be offloaded, expected what is shown to "
        "train right (README, engines). Fix: engine.zero_stage=3, or engine.offload=optimizer",
    ),
    (
        *("engine-capabilities", ZERO | {"engine.zero_stage": 3, "engine.offload": Offload.nvme}, 1),
        "engine=deepspeed engine.zero_stage=3 engine.offload=nvme: found ZeRO 3, offload nvme: DeepSpeed's "
        "operation for asynchronous disk access (libaio) was not at hand, so this was never tested, expected "
        "what is shown to train right (README, engines). Fix: engine.offload=optimizer",
    ),
    (
        *("engine-keys", {"engine.zero_stage": 1}, 1),
        "engine.zero_stage=1: found engine=megatron, expected engine=deepspeed, which knows it. "
        "Fix: leave engine.zero_stage out, or engine=deepspeed",
    ),
    (
        *("engine-keys", {"engine.offload": Offload.optimizer}, 1),
        "engine.offload=optimizer: found engine=megatron, expected engine=deepspeed, which knows it. "
        "Fix: leave engine.offload out, or engine=deepspeed",
    ),
    (
        *("engine-keys", ZERO | {"engine.zero_stage": 2, "engine.persistent_parameters": 0}, 1),
        "engine.persistent_parameters=0: found engine.zero_stage=2, expected stage 3, which gathers "
        "parameters. Fix: leave engine.persistent_parameters out, or engine.zero_stage=3",
    ),
    (
        *("engine-keys", ZERO | {"engine.zero_stage": 1, "engine.overlap_param_gather": True}, 1),
        "engine.overlap_param_gather=true: found engine=deepspeed, expected engine=megatron, which knows it. "
        "Fix: engine.overlap_param_gather=false, or engine=megatron",
    ),
]


@pytest.mark.parametrize(
    ("rule", "changes", "ranks", "line"), BROKEN, ids=[f"{b[0]}-{i}" for i, b in enumerate(BROKEN)]
)
def test_a_broken_rule_gives_its_line_and_no_other_rule_speaks(
    rule: str, changes: dict[str, Any], ranks: int, line: str
):
    assert violations(changes, ranks) == [f"[{rule}] {line}"]


# Rules whose message needs a corpus on disk have their own tests below.
TESTED = {broken[0] for broken in BROKEN} | {"corpus"}


@pytest.mark.parametrize("rule", [rule.id for rule in RULES])
def test_every_rule_of_the_table_has_a_test(rule: str):
    assert rule in TESTED


def test_rule_ids_are_unique():
    ids = [rule.id for rule in RULES]
    assert len(ids) == len(set(ids))


def test_the_base_of_these_tests_breaks_no_rule():
    assert violations({}) == []
    assert violations({}, corpus=None) == []


# Layouts that a too eager rule would refuse.
VALID: list[tuple[dict[str, Any], int]] = [
    (spikes(), 1),
    ({**spikes(norm_threshold=8.0, margin=0), "checkpoint.every": 1, "checkpoint.keep": 4}, 1),
    ({"data.skip": ((8, 4), (0, 12)), "data.block": 4}, 1),
    ({"resilience.stall_seconds": None, "launch.timeout_minutes": 1}, 2),
    ({"resilience.stall_seconds": 60.0, "launch.timeout_minutes": 1}, 1),
    ({"launch.ranks": 4, "parallel.tensor": 2, "parallel.pipeline": 2}, 4),
    ({"parallel.tensor": 8}, 8),  # more tensor ranks than key-value heads: each head is held twice
    ({"parallel.tensor": 2, "parallel.sequence": True, "parallel.context": 2}, 4),
    ({"parallel.context": 4, "parallel.context_method": ContextMethod.ulysses, "model.seq_len": 36}, 4),
    ({"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}, 2),
    (
        {"parallel.pipeline": 4, "train.global_batch": 3},
        4,
    ),  # fewer micro-batches than stages: slow, not wrong
    ({"model.moe.experts": 4, "parallel.expert": 2, "parallel.tensor": 2, "parallel.sequence": True}, 2),
    # Experts are not split over tensor ranks; only dense layers and the shared expert are.
    ({"model.moe.experts": 4, "model.ffn": 97, "parallel.tensor": 2, "parallel.sequence": True}, 2),
    ({"model.head_dim": 6}, 1),
    ({"model.head_dim": 7, "model.position": Position.learned}, 1),
    ({"train.batch_ramp.start": 2, "train.batch_ramp.increment": 2, "train.batch_ramp.samples": 50}, 2),
    ({"train.steps": None, "train.tokens": 1_000_000}, 1),
    (
        {
            "train.steps": None,
            "train.tokens": 1_000_000,
            "train.count": Count.layer_tokens,
            "techniques.token_dropping": DROPPING,
        },
        1,
    ),
    ({"techniques.gradual_pruning": GradualPruningConfig(every=25)}, 1),
    ({"techniques.static_sparsity": StaticSparsityConfig(TWO_FOUR), "parallel.tensor": 8}, 8),
    (
        {
            "techniques.static_sparsity": StaticSparsityConfig(TWO_FOUR, sparsity=0.5),
            "model.moe.experts": 4,
            "model.ffn": 98,
            "model.moe.ffn": 96,
        },
        1,
    ),  # no layer has model.ffn
    ({"techniques.token_dropping": DROPPING, "model.layers": 3}, 1),
    (
        {"techniques.token_dropping": dataclasses.replace(DROPPING, layers=(0, 7))},
        1,
    ),  # first and last, if asked
    ({"techniques.token_dropping": DROPPING, "parallel.tensor": 4, "parallel.sequence": True}, 4),
    ({"techniques.token_dropping": dataclasses.replace(DROPPING, round_to=2), "parallel.tensor": 4}, 4),
    ({"schedule.warmup": 0.0}, 1),
    ({"schedule.warmup": 100.0}, 1),
    ({"optim.clip": 0.0, "optim.weight_decay": 0.0}, 1),
    ({"optim.name": OptimName.lion, "optim.eps": None}, 1),
    ({"optim.name": OptimName.muon, "optim.muon": MuonConfig(), "parallel.tensor": 2}, 4),
    ({"data.mixture": {"books": 2.0}, "model.seq_len": 1024}, 1),  # code is too short, and not read
    ({"model.vocab": 1000}, 1),
    ({"model.vocab": 2048}, 1),
    ({"checkpoint": CheckpointConfig(every=10)}, 1),
]


@pytest.mark.parametrize(("changes", "ranks"), VALID)
def test_valid_layouts_pass(changes: dict[str, Any], ranks: int):
    assert violations(changes, ranks) == []


def test_moe_layers_leave_dense_layers_to_divide():
    changes = {"model.moe.experts": 4, "model.moe.every": 2, "model.ffn": 97}
    parallel = {"parallel.tensor": 2, "parallel.sequence": True}
    assert [line.split()[0] for line in violations(changes | parallel, 2)] == ["[ffn-by-tensor]"]
    shared = {"model.moe.experts": 4, "model.moe.shared_ffn": 33}
    assert violations(shared | parallel, 2) == [
        "[ffn-by-tensor] model.moe.shared_ffn=33: found 33 % 2 = 1, expected a multiple of "
        "parallel.tensor=2. "
        "Fix: change it or parallel.tensor"
    ]


def test_every_level_of_a_batch_ramp_must_suit_interleaving():
    ramp = {"train.batch_ramp.start": 3, "train.batch_ramp.increment": 1, "train.batch_ramp.samples": 50}
    layout = {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}
    assert [line.partition(":")[0] for line in violations(ramp | layout, 2)] == [
        "[interleaved-micro-batches] train.batch_ramp.start=3",
        "[interleaved-micro-batches] train.batch_ramp.increment=1",
    ]


def test_all_violations_come_together():
    found = violations({"optim.lr": -1.0, "parallel.tensor": 3, "train.steps": None, "eval.every": 1}, 4)
    ids = [line.split("]")[0].strip("[") for line in found]
    assert ids == ["range", "ranks", "heads-by-tensor", "kv-heads-by-tensor", "vocab-by-tensor", "run-length"]


def test_sizes_are_compared_only_when_each_is_valid():
    found = violations({"model.heads": 0, "parallel.tensor": 3, "optim.lr": -1.0}, 4)
    assert [line.split()[0] for line in found] == ["[size]", "[range]"]


def manifest(path: Path, content: Any) -> RunConfig:
    (path / "manifest.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return change(BASE, {"data.path": str(path)})


def test_facts_come_from_the_manifest(tmp_path: Path):
    domains = [
        {"name": name, "splits": {"train": {"tokens": tokens}, "valid": {"tokens": 1}}}
        for name, tokens in (("web", 70), ("code", 30))
    ]
    config = manifest(tmp_path, {"tokenizer": {"vocab_size": 512}, "domains": domains})
    facts = corpus_facts(config)
    valid = {"web": 1, "code": 1}
    assert facts == CorpusFacts(str(tmp_path), 512, {"web": 70, "code": 30}, valid_tokens=valid)
    check_all(change(config, {"model.seq_len": 16}), ranks=1, corpus=facts)


def test_the_manifest_the_data_pipeline_writes_has_the_facts(tmp_path: Path):
    import numpy as np

    from megafab.data.format import Corpus, ShardWriter, split_entry, write_manifest

    splits: dict[str, Any] = {}
    for split, documents in (("train", 50), ("valid", 2)):
        writer = ShardWriter(tmp_path, f"{split}/web-00000", np.dtype(np.uint16))
        for _ in range(documents):
            writer.append([1, 2, 3, 0])
        splits[split] = split_entry([writer.close()], text_bytes=10)
    tokenizer = {"vocab_size": 512, "eod": 0, "fingerprint": "x"}
    write_manifest(tmp_path, {"tokenizer": tokenizer, "domains": [{"name": "web", "splits": splits}]})
    corpus = Corpus.open(tmp_path)
    facts = corpus_facts(change(BASE, {"data.path": str(tmp_path)}))
    tokens = {"web": corpus.tokens("train")[0]}
    valid = {"web": corpus.tokens("valid")[0]}
    assert facts == CorpusFacts(str(tmp_path), corpus.vocab_size, tokens, corpus.fingerprint, valid)
    assert facts.tokens == {"web": 200}


def lines(config: RunConfig) -> list[str]:
    with pytest.raises(RuleErrors) as caught:
        check_all(config, ranks=1, corpus=corpus_facts(config))
    return str(caught.value).splitlines()


def test_a_missing_corpus_is_one_line_among_the_others(tmp_path: Path):
    path = str(tmp_path / "nothing")
    expected = (
        f"[corpus] data.path={path}: found no such directory, expected a directory with manifest.json. "
        f"Fix: make one: megafab data out={path} sources={{...}}; or give data.path another directory"
    )
    found = lines(change(BASE, {"data.path": path, "optim.lr": 0.0}))
    assert found == [
        "[range] optim.lr=0: found 0, expected more than 0. Fix: give optim.lr a value more than 0",
        expected,
    ]
    assert "found no manifest.json in it" in lines(change(BASE, {"data.path": str(tmp_path)}))[0]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"domains": [{}], "tokenizer": {"vocab_size": 3}}'])
def test_a_manifest_of_another_kind_is_the_users_error(tmp_path: Path, content: str):
    (found,) = lines(manifest(tmp_path, content))
    assert found.startswith(f"[corpus] data.path={tmp_path}: found a manifest.json that cannot be read (")


def test_a_corpus_without_tokens_is_refused(tmp_path: Path):
    domains = [{"name": "web", "splits": {"train": {"tokens": 0}, "valid": {"tokens": 1}}}]
    (found,) = lines(manifest(tmp_path, {"tokenizer": {"vocab_size": 512}, "domains": domains}))
    assert found.startswith(f"[domain-length] data.path={tmp_path}: found no training tokens, expected some.")


def test_an_index_of_difficulty_belongs_to_a_corpus_and_a_length():
    changes = indexed()
    assert violations(changes) == []
    (found,) = violations(changes, corpus=dataclasses.replace(CORPUS, fingerprint="4567"))
    assert f"[curriculum-index] techniques.curriculum.difficulty={index()}: " in found
    assert "expected one of the corpus 4567" in found
    (found,) = violations(changes | {"model.seq_len": 16})
    assert "found windows of 32 tokens, expected windows of model.seq_len=16." in found


@pytest.mark.parametrize(
    ("pacing", "parallel", "ranks"),
    [
        ({}, {"parallel.context": 2}, 2),
        ({}, {"parallel.tensor": 2, "parallel.sequence": True}, 2),
        ({"round_to": 1.0}, {"parallel.pipeline": 2}, 2),
        ({"start": None, "end": None, "steps": None, "round_to": 1.0} | STEPS, {"parallel.tensor": 2}, 2),
        ({"shape": PacingShape.root, "degree": 2.0}, {}, 1),
        ({"shape": PacingShape.custom, "steps": None, "function": "mine:stairs"}, {}, 1),
    ],
)
def test_a_pacing_that_fits_passes(pacing: dict[str, Any], parallel: dict[str, Any], ranks: int):
    assert violations(sequences(**pacing) | parallel, ranks) == []


def test_a_corpus_without_validation_text_cannot_be_evaluated_on():
    corpus = dataclasses.replace(CORPUS, valid_tokens={"books": 0, "code": 0})
    assert violations({}, corpus=corpus) == [
        "[eval-samples] eval.samples=64: found a corpus without a validation split, expected text to "
        "evaluate on. Fix: eval.samples=0, or a corpus with valid_fraction=0.01"
    ]
    assert violations({"eval.samples": 0}, corpus=corpus) == []
    loading = DynamicLoadingConfig(reference={"books": 1.0, "code": 1.0})
    changes = {"techniques.dynamic_loading": loading, "eval.every": 10}
    assert violations(changes, corpus=dataclasses.replace(CORPUS, valid_tokens={"books": 9, "code": 0})) == [
        "[dynamic-loading] data.path=corpus: found no validation text in code, expected some in each domain "
        "that is mixed. Fix: build the corpus with a larger valid_fraction, or leave them out of data.mixture"
    ]
    below = dataclasses.replace(loading, reference={"books": -1.0, "code": 1.0})
    assert violations({**changes, "techniques.dynamic_loading": below}) == [
        "[dynamic-loading] techniques.dynamic_loading.reference.books=-1: found -1, expected 0 or more. "
        "Fix: give the loss of a model in nats a token"
    ]
