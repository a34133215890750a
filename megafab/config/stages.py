"""A training in stages: what `stages:` of a recipe says, as one whole configuration for each of them.

    stages:
      small:                          # the first begins with random weights
        model: {layers: 2}            # what differs from the rest of the recipe; groups too (schedule: wsd)
        train: {steps: 100}
      large:
        grow: {layers: 8}             # from the last checkpoint of the stage before, or of `parent`
        train: {steps: 300}

On the command line, `KEY=VALUE` is for all stages and over what the file says of any; `stages.NAME.KEY=VALUE`
is for one and over both. A stage's run is in `<run.dir>/<its name>`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from megafab.checkpoint.changes import MEANING, of_weights, shown
from megafab.checkpoint.config import Carry, GrowConfig, Moments
from megafab.config import growth, load, rules
from megafab.config.schema import RunConfig
from megafab.config.tree import Tree, did_you_mean, field_types, to_tree
from megafab.data.derived import NAME
from megafab.errors import ConfigError, ConfigErrors
from megafab.model.config import ModelConfig, Position
from megafab.model.shape import ModelShape
from megafab.telemetry.config import RunSection

SCRATCH = "scratch"  # the parent of a stage that begins with random weights
START = "start"  # directory of what an operation makes, in that of the stage
_PREFIX = "stages."
# Beside what a checkpoint's weights mean, the sizes that they have.
_MODEL = (*MEANING, *(f"model.{size}" for size in ("hidden", "kv_heads", "head_dim", "ffn", "vocab")))


@dataclass(frozen=True, slots=True)
class Operation:
    """What a stage says beside the configuration of its run: which weights it begins with."""

    parent: str | None = None  # an earlier stage; null: the one before it; scratch: random weights
    grow: GrowConfig | None = None  # the parent's model into a larger one, whose sizes the stage then has
    densify: bool = False  # take the parent's masks off

    @property
    def is_any(self) -> bool:
        """Whether there is something to make of the parent's checkpoint."""
        return self.densify or self.grow is not None


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of a training: `parent` is the stage whose last checkpoint it begins with."""

    name: str
    config: RunConfig
    operation: Operation
    parent: str | None


def of(overrides: Sequence[str]) -> list[Stage]:
    """The stages that a command line asks for; none where it asks for a single run.

    Raises:
        ConfigError: with one line for every mistake in the overrides or the files.
    """
    common = [text for text in overrides if not text.startswith(_PREFIX)]
    own = [text.removeprefix(_PREFIX) for text in overrides if text.startswith(_PREFIX)]
    declared = load.declared_stages(common)
    if not declared:
        if own:
            expected, fix = "a recipe that has stages", "leave stages. out, or choose a recipe: recipe=..."
            raise ConfigError(_PREFIX + own[0], "a single run", expected, fix)
        return []
    for text in own:
        name, dot, _ = text.partition("=")[0].partition(".")
        if name in declared and not dot:
            found, fix = "no key of the stage", f"{_PREFIX}{name}.train.steps=100, for example"
            raise ConfigError(_PREFIX + text, found, "stages.NAME.KEY=VALUE", fix)
        if name not in declared:
            fix = did_you_mean(name, declared) or f"name one of {', '.join(declared)}"
            raise ConfigError(_PREFIX + text, f"no stage {name}", f"one of {', '.join(declared)}", fix)
    stages: list[Stage] = []
    problems: list[ConfigError] = []
    for name, tree in declared.items():
        mine = [text.partition(".")[2] for text in own if text.partition(".")[0] == name]
        try:
            stages.append(_stage(name, tree, common, mine, stages))
        except ConfigErrors as several:
            problems += [_of(name, problem) for problem in several.problems]
        except ConfigError as problem:
            problems.append(_of(name, problem))
        if problems:  # what follows may depend on it
            raise ConfigErrors(problems)
    return stages


def named(stages: Sequence[Stage], name: str | None) -> Stage:
    """The stage of that name.

    Raises:
        ConfigError: there is none, or none was chosen.
    """
    names = [stage.name for stage in stages]
    if name not in names:
        where, found = ("stage", "no choice") if name is None else (f"stage={name}", f"no stage {name}")
        expected = f"one of {', '.join(names)}" if names else "a recipe that has stages"
        fix = did_you_mean(name or "", names) or (f"add stage={names[0]}" if names else "leave it out")
        raise ConfigError(where, found, expected, fix)
    return stages[names.index(name)]


def check_all(stages: Sequence[Stage]) -> None:
    """Try every rule on every stage, before the first begins.

    Raises:
        ConfigErrors: with one line for every violation, which names its stage.
    """
    problems = list(_inherited(stages))
    for stage in stages:
        corpus = rules.corpus_facts(stage.config)
        try:
            rules.check_all(stage.config, ranks=stage.config.launch.ranks, corpus=corpus)
        except ConfigErrors as several:
            problems += [_of(stage.name, problem) for problem in several.problems]
    if problems:
        raise ConfigErrors(problems)


def check_inheritance(stages: Sequence[Stage]) -> None:
    """Try only whether each stage can begin with its parent's checkpoint.

    Raises:
        ConfigErrors: with one line for every violation, which names its stage.
    """
    problems = list(_inherited(stages))
    if problems:
        raise ConfigErrors(problems)


def _inherited(stages: Sequence[Stage]) -> Iterator[ConfigError]:
    for stage in stages:
        if stage.parent is not None:
            parent = named(stages, stage.parent)
            yield from (_of(stage.name, problem) for problem in _inheritance(stage, parent))


def _of(name: str, problem: ConfigError) -> ConfigError:
    return ConfigError(f"{_PREFIX}{name}: {problem.where}", problem.found, problem.expected, problem.fix)


def _stage(
    name: str, tree: Any, common: Sequence[str], mine: Sequence[str], earlier: Sequence[Stage]
) -> Stage:
    if not NAME.fullmatch(name) or "." in name or name == SCRATCH:
        expected = f"letters, digits, '_' and '-', and not {SCRATCH}"
        raise ConfigError(name, "no name of a stage", expected, "another name")
    if not isinstance(tree, dict):
        raise ConfigError(name, "no mapping", "what differs in this stage", "give a section, such as train:")
    tree, keys = cast(Tree, tree), field_types(Operation)
    operation = load.compose(
        Operation,
        "stage",
        [text for text in mine if _key(text) in keys],
        under={key: value for key, value in tree.items() if key in keys},
    )
    under = {key: value for key, value in tree.items() if key not in keys}
    overrides = [text for text in mine if _key(text) not in keys]
    given = [text for text in overrides if _key(text) == "run"]
    if given or "run" in under:
        expected, fix = "run.name and run.dir of them all", "set them without stages.NAME"
        raise ConfigError(given[0] if given else "run", "set for one stage", expected, fix)
    config = load.compose(RunConfig, "train", [*common, *overrides], under=under)
    if config.checkpoint.resume != "auto":
        where, found = f"checkpoint.resume={config.checkpoint.resume}", "not auto"
        expected, fix = "a stage that goes on with its own checkpoints", "leave it out"
        raise ConfigError(where, found, expected, fix)
    parent = _parent(operation, earlier)
    _check_operation(operation, parent)
    if operation.grow is not None and parent is not None:
        sizes = [text for text in overrides if _key(text) == "model"]
        if sizes or "model" in under:
            where, fix = sizes[0] if sizes else "model", "give its sizes in grow only"
            raise ConfigError(where, "set beside grow", "the model that grow makes of the parent's", fix)
        config = replace(config, model=_grown(parent, operation.grow))
    root = Path(config.run.dir)
    run = RunSection(f"{config.run.name}-{name}", str(root / name))
    tracking = replace(config.tracking, group=config.tracking.group or config.run.name)
    config = replace(config, run=run, tracking=tracking)
    if parent is not None:
        # For a stage with a parent, a start.checkpoint of the command line is that of the first.
        source = root / name / START if operation.is_any else root / parent.name
        config = replace(config, start=replace(config.start, checkpoint=str(source)))
    return Stage(name, config, operation, parent and parent.name)


def _key(text: str) -> str:
    return text.partition("=")[0].partition(".")[0]


def _parent(operation: Operation, earlier: Sequence[Stage]) -> Stage | None:
    if operation.parent == SCRATCH or (operation.parent is None and not earlier):
        return None
    if operation.parent is None:
        return earlier[-1]
    names = [stage.name for stage in earlier]
    if operation.parent not in names:
        fix = did_you_mean(operation.parent, names) or f"name an earlier stage, or {SCRATCH}"
        expected = f"one of {', '.join((*names, SCRATCH))}"
        raise ConfigError(f"parent={operation.parent}", "no earlier stage", expected, fix)
    return earlier[names.index(operation.parent)]


def _check_operation(operation: Operation, parent: Stage | None) -> None:
    for key, given in (("grow", operation.grow is not None), ("densify", operation.densify)):
        if given and parent is None:
            expected, fix = "a parent whose checkpoint it changes", "leave it out, or name a parent"
            raise ConfigError(key, "a stage that begins with random weights", expected, fix)
    if operation.grow is not None and operation.densify:
        expected, fix = "one operation a stage", "densify in a stage of its own"
        raise ConfigError("grow, densify", "two operations", expected, fix)


def _grown(parent: Stage, config: GrowConfig) -> ModelConfig:
    """The model that the parent's becomes. Where its corpus cannot be read, the rules say so later."""
    corpus = rules.corpus_facts(parent.config)
    ids = corpus.vocab_size or parent.config.model.vocab or 1
    return growth.grown(ModelShape.of(parent.config.model, ids), config, ids=ids)


_MASKING = ("static_sparsity", "gradual_pruning")


def _masking(stage: Stage, parent: Stage) -> Iterator[ConfigError]:
    """Masks go on with their technique, or are taken off on purpose."""
    techniques = parent.config.techniques, stage.config.techniques
    if stage.operation.densify and not any(getattr(techniques[0], name) for name in _MASKING):
        expected, fix = f"a parent with {' or '.join(_MASKING)}", "leave densify out"
        yield ConfigError("densify=true", "a dense parent", expected, fix)
    static = [one.static_sparsity for one in techniques]
    if static[0] and static[1] and static[0] != static[1] and not stage.operation.densify:
        found, fix = "other masks than the parent's", "the parent's settings, or densify in a stage between"
        yield ConfigError("techniques.static_sparsity", found, "the same masks", fix)
    if techniques[0].gradual_pruning and techniques[1].gradual_pruning:
        expected, fix = "one ramp, by the compute of one run", "make it one stage"
        yield ConfigError("techniques.gradual_pruning", "a parent that was pruned", expected, fix)
    for name in _MASKING:
        then, now = (getattr(one.config.techniques, name) is not None for one in (parent, stage))
        if then and stage.operation.grow is not None:
            expected, fix = "a dense parent", "densify in a stage of its own, and grow that"
            yield ConfigError("grow", f"a parent under the masks of {name}", expected, fix)
        elif then and not now and not stage.operation.densify:
            expected, fix = "the technique, or densify=true", f"technique: [{name}], or densify: true"
            yield ConfigError(f"techniques.{name}=null", "a parent under its masks", expected, fix)
        elif now and stage.operation.densify:
            expected, fix = "one of them", "leave the technique out of this stage, or densify"
            yield ConfigError(f"densify=true, techniques.{name}", "masks taken off and put on", expected, fix)


def _inheritance(stage: Stage, parent: Stage) -> Iterator[ConfigError]:
    """What keeps a stage from beginning with its parent's checkpoint."""
    if not parent.config.checkpoint.save_last:
        where, fix = f"stages.{parent.name}.checkpoint.save_last=false", "leave it out"
        yield ConfigError(where, "no last checkpoint", f"one for stage {stage.name}", fix)
    yield from _masking(stage, parent)
    grow, keeps = stage.operation.grow, stage.config.start.optimizer is Carry.keep
    names = [one.config.optim.name.value for one in (parent, stage)]
    if keeps and names[0] != names[1]:
        expected, fix = f"optim.name={names[0]}, whose moments they are", "start.optimizer=reset"
        yield ConfigError("start.optimizer=keep", f"optim.name={names[1]}", expected, fix)
    if keeps and (stage.operation.densify or (grow and grow.optimizer is not Moments.copy)):
        expected = "moments in what it begins with"
        found, fix = ("densify, which leaves them out", "start.optimizer=reset")
        if grow is not None:
            found, fix = "grow.optimizer=reset", "grow.optimizer=copy, where it is defined"
        yield ConfigError("start.optimizer=keep", found, expected, fix)
    if grow is not None:
        if grow.optimizer is Moments.copy and not keeps:
            expected, fix = "start.optimizer=keep, for them to be used", "set both, or leave both out"
            yield ConfigError("grow.optimizer=copy", "start.optimizer=reset", expected, fix)
        return
    then, now = (to_tree(one.config.model) for one in (parent, stage))
    learned = parent.config.model.position is Position.learned  # a table of that length
    for key, old, new in of_weights(then, now):
        if key in _MODEL or (learned and key == "model.seq_len"):
            found, fix = f"{key}={shown(old)} in stage {parent.name}", "the same value, or grow: {...}"
            yield ConfigError(f"{key}={shown(new)}", found, "the model of the parent", fix)
