"""Hydra's files and command-line overrides to one frozen tree of dataclasses.

Hydra reads `conf/`: the defaults list, the groups and the recipe. What Hydra composed is laid over the
dataclasses' own defaults, the overrides are laid over that, and `tree.build` checks the result. Every
mistake is a `ConfigError` of one line, and those of one command are reported together.

Nothing of Hydra's or OmegaConf's leaves this file, Hydra's run-time side (working directories, outputs,
logging) is never started, and torch is not imported.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from megafab.config.schema import RunConfig
from megafab.config.tree import (
    MISSING,
    Tree,
    annotation_of,
    build,
    default_tree,
    did_you_mean,
    is_mapping,
    is_section,
    nearest,
    to_tree,
    unknown_key,
    unwrap,
)
from megafab.errors import ConfigError, ConfigErrors

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

T = TypeVar("T")

_STAGES = "stages"  # the key of a recipe that `config/stages.py` makes several runs of


def load(overrides: Sequence[str], config_name: str = "train") -> RunConfig:
    """The configuration of a training run, from `conf/<config_name>.yaml` and overrides.

    Raises:
        ConfigError: with one line for every mistake in the overrides or the files.
    """
    return compose(RunConfig, config_name, overrides)


def compose(schema: type[T], config_name: str, overrides: Sequence[str], *, under: Tree | None = None) -> T:
    """A verb's configuration: `schema` with `conf/<config_name>.yaml` and the overrides laid over it.

    Keys that exist neither in the files nor on the command line keep the dataclasses' defaults. An
    override of a `dict[str, X]` key replaces the mapping, one of a section is merged into it.

    Args:
        schema: the dataclass.
        config_name: of the file.
        overrides: of the command line.
        under: what one stage of a recipe says, values and choices of groups, between the files and the
            overrides; None: this is no stage, and files that have stages are refused.

    Raises:
        ConfigError: with one line for every mistake in the overrides or the files.
    """
    groups = config_groups(config_name)
    problems: list[ConfigError] = []
    undecided: list[ConfigError] = []  # without every choice there is nothing to compose
    choices, values = _sorted(overrides, schema, groups, undecided, problems)
    chosen = {choice.partition("=")[0] for choice in choices}
    presets = {key: value for key, value in (under or {}).items() if _is_choice(key, value, groups)}
    own = [_as_override(key, value) for key, value in presets.items() if key not in chosen]
    choices = [*_sorted(own, schema, groups, undecided, problems)[0], *choices]
    undecided = undecided or _missing_choices(groups, choices)
    if undecided:
        raise ConfigErrors(undecided + problems)
    files = _hydra(config_name, choices)
    declared = files.pop(_STAGES, None)
    if declared and under is None:
        expected, fix = "a single run", "megafab train runs them all; to run one, add stage=NAME"
        raise ConfigError("recipe", f"stages {', '.join(declared)}", expected, fix)
    tree = _merge(default_tree(schema), files)
    if under:
        _lay(tree, {key: value for key, value in under.items() if key not in presets}, schema)
    for value in values:
        with _noting(problems):
            value.put(tree, groups, choices)
    with _noting(problems):
        config = build(schema, _resolve(tree, f"conf/{config_name}.yaml"))
        if not problems:
            return config
    raise ConfigErrors(problems)


def is_sweep(text: str) -> bool:
    """Whether an override of a training run has several values: `optim.lr=1e-3,3e-4`, `train.seed=range(4)`.

    What a key that takes text is given is one text, whatever is in it.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return False  # a mistake, of which `compose` tells
    return override.is_sweep_override() and not _takes_text(RunConfig, text.partition("=")[0])


def sweep(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of the values that the overrides of a sweep give, the last varying fastest.

    Raises:
        ConfigError: none of them is a sweep, or one is of a kind that needs Hydra's own launcher (a glob).
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    axes: list[list[str]] = []
    for text in filter(is_sweep, overrides):
        override = OverridesParser.create().parse_override(text)
        try:
            axes.append([f"{override.get_key_element()}={v}" for v in override.sweep_string_iterator()])
        except HydraException as error:
            expected, fix = "a list of values, or range(...)", f"{override.get_key_element()}=a,b,c"
            raise ConfigError(text, " ".join(str(error).split()), expected, fix) from None
    if not axes:
        expected, fix = "a key with several values", "add one, such as optim.lr=1e-3,3e-4, or leave it out"
        raise ConfigError("--multirun", "no sweep", expected, fix)
    return list(itertools.product(*axes))


def declared_stages(overrides: Sequence[str]) -> Tree:
    """The `stages` of a training run's files, by name and in order, for the recipe that is chosen.

    None where the choices have mistakes, of which `compose` tells all.
    """
    groups = config_groups("train")
    undecided: list[ConfigError] = []
    choices, _ = _sorted(overrides, RunConfig, groups, undecided, [])
    if undecided or _missing_choices(groups, choices):
        return {}
    return _hydra("train", choices).get(_STAGES) or {}


def from_yaml(path: str | Path) -> RunConfig:
    """The configuration that a run directory's `config.yaml` holds.

    Raises:
        ConfigError: no such file, not YAML, or keys and values that this version does not know.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        fix = "name the config.yaml of a run directory"
        raise ConfigError(str(path), reason, "a run's config.yaml", fix) from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(str(path), " ".join(str(error).split()), "YAML", "restore the file") from None
    if not isinstance(content, dict):
        raise ConfigError(str(path), "no mapping", "sections like model: and train:", "restore the file")
    tree = _merge(default_tree(RunConfig), cast(Tree, content))
    return build(RunConfig, _resolve(tree, str(path)))


def resolved_yaml(config: Any) -> str:
    """The whole configuration as YAML, every value spelled out; `from_yaml` reads it back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(to_tree(config)))


def config_directory() -> Path:
    """`conf/` of the source checkout, or its copy inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "conf"
    return checkout if checkout.is_dir() else package / "conf"


@dataclass(frozen=True, slots=True)
class Group:
    """A directory of `conf/` that a verb chooses from: `model=llama_tiny`."""

    name: str
    options: tuple[str, ...]
    default: Any  # of the defaults list: a name, a list of names, "???" or None

    @property
    def takes_list(self) -> bool:
        """Whether several options may be chosen at once: `technique=[z_loss,ema]`."""
        return isinstance(self.default, list)


def config_groups(config_name: str) -> dict[str, Group]:
    """The groups in the defaults list of `conf/<config_name>.yaml`."""
    from omegaconf import OmegaConf

    directory = config_directory()
    content = OmegaConf.to_container(OmegaConf.load(directory / f"{config_name}.yaml"))
    entries: list[Any] = cast(Tree, content).get("defaults", []) if isinstance(content, dict) else []
    groups: dict[str, Group] = {}
    for entry in entries:
        if isinstance(entry, dict):
            name, default = next(iter(cast(Tree, entry).items()))
            options = sorted(path.stem for path in (directory / name).glob("*.yaml"))
            groups[name] = Group(name, tuple(options), default)
    return groups


@contextmanager
def _noting(problems: list[ConfigError]) -> Generator[None]:
    try:
        yield
    except ConfigErrors as several:
        problems += several.problems
    except ConfigError as problem:
        problems.append(problem)


def _parse(overrides: Sequence[str], schema: type, problems: list[ConfigError]) -> list[Override]:
    """Hydra's own grammar, one override at a time so that each mistake is reported.

    A key that takes text takes any text: what the grammar refuses or would sweep over (a prompt, a path
    with an equals sign) counts as quoted.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed: list[Override] = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            override = None
        key, _, raw = text.partition("=")
        if (override is None or override.is_sweep_override()) and _takes_text(schema, key):
            override = parser.parse_override(f"{key}={_quoted(raw)}")
        if override is None:
            fix = f"quote the value: '{key}={_quoted(raw)}'" if raw else "write key=value"
            problems.append(ConfigError(text, "something that is not an override", "key=value", fix))
        elif override.is_sweep_override():
            fix = f"give one value, or a list as {key}=[a,b]"
            problems.append(ConfigError(text, "several values", "one, since a run is not a sweep", fix))
        elif override.is_delete() or override.package is not None:
            fix = f"set it instead: {override.key_or_group}=null"
            problems.append(ConfigError(text, "a deletion or a package", "key=value", fix))
        else:
            parsed.append(override)
    return parsed


def _takes_text(schema: type, key: str) -> bool:
    return unwrap(annotation_of(schema, key))[0] is str


def _quoted(text: str) -> str:
    """`text` in Hydra's double quotes; backslashes count only before a quote."""
    return '"' + re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ("\\" + m[2] if m[2] else ""), text) + '"'


def _sorted(
    overrides: Sequence[str],
    schema: type,
    groups: Mapping[str, Group],
    undecided: list[ConfigError],
    problems: list[ConfigError],
) -> tuple[list[str], list[_Value]]:
    """Choices of groups as Hydra takes them, and values; with what is wrong with either."""
    choices: list[str] = []
    values: list[_Value] = []
    for override in _parse(overrides, schema, problems):
        group = groups.get(override.key_or_group)
        if group is not None and not isinstance(override.value(), dict):
            choices += _choice(group, override, undecided)
        else:
            with _noting(problems):
                values.append(_Value.of(override, schema, groups))
    return choices, values


def _is_choice(key: str, value: Any, groups: Mapping[str, Group]) -> bool:
    return key in groups and not isinstance(value, dict)


def _as_override(key: str, value: Any) -> str:
    if isinstance(value, list):
        return f"{key}=[{','.join(map(str, cast(list[Any], value)))}]"
    return f"{key}={value}"


def _lay(tree: Tree, over: Tree, schema: type, prefix: str = "") -> None:
    """Lay a stage's values over the tree, in place: sections are merged, mappings replaced."""
    for key, value in over.items():
        annotation = annotation_of(schema, prefix + key)
        if is_section(annotation) and isinstance(value, dict):
            if not isinstance(tree.get(key), dict):
                tree[key] = default_tree(unwrap(annotation)[0])
            _lay(cast(Tree, tree[key]), cast(Tree, value), schema, f"{prefix}{key}.")
        else:
            tree[key] = value


def _choice(group: Group, override: Override, problems: list[ConfigError]) -> list[str]:
    """One override of a group, checked, as Hydra takes it."""
    value = override.value()
    names: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    text = override.input_line or group.name
    fix: str | None = None
    for name in names:
        if name not in group.options:
            fix = did_you_mean(str(name), group.options, prefix=f"{group.name}=")
            fix = fix or f"{group.name}={group.options[0]}, for example"
            expected = f"one of {', '.join(group.options)}"
            problems.append(ConfigError(text, f"no {group.name} named {name}", expected, fix))
    if fix is None and not group.takes_list and (len(names) > 1 or not (names or group.default is None)):
        expected = f"one of {', '.join(group.options)}"
        problems.append(ConfigError(text, f"{len(names)} names", expected, f"choose one {group.name}"))
    if group.takes_list:
        return [f"{group.name}=[{','.join(map(str, names))}]"]
    return [f"{group.name}={names[0]}"] if names else []


def _missing_choices(groups: Mapping[str, Group], choices: Sequence[str]) -> list[ConfigError]:
    """Groups without a default that the command line does not decide; a recipe may decide any."""
    chosen = {choice.partition("=")[0] for choice in choices}
    if "recipe" in chosen:
        return []
    undecided = [g for g in groups.values() if g.default == MISSING and g.name not in chosen]
    return [
        ConfigError(g.name, "no choice", f"one of {', '.join(g.options)}", f"add {g.name}={g.options[0]}")
        for g in undecided
    ]


def _hydra(config_name: str, choices: Sequence[str]) -> Tree:
    """What Hydra composes from the files for these choices.

    A tenth of a second or two, and a command asks twice: for the stages, then for the one run.
    """
    return deepcopy(_composed(config_directory(), config_name, tuple(choices)))


@cache
def _composed(directory: Path, config_name: str, choices: tuple[str, ...]) -> Tree:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        with initialize_config_dir(str(directory), version_base="1.3", job_name="megafab"):
            composed = hydra_compose(config_name, overrides=list(choices))
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        where, fix = f"conf/{config_name}.yaml", "correct the file or choose another option"
        raise ConfigError(where, _one_line(error), "files that compose", fix) from None
    return cast(Tree, OmegaConf.to_container(composed))


@dataclass(frozen=True, slots=True)
class _Value:
    """An override of a value: where it goes, what it is, and how the user wrote it."""

    key: str
    value: Any
    text: str
    merges: bool  # into what is there, instead of replacing it
    in_mapping: bool  # below a key of type dict[str, X], which may still be null

    @staticmethod
    def of(override: Override, schema: type, groups: Mapping[str, Group]) -> _Value:
        """The override, when its key exists."""
        key, value = override.key_or_group, cast(Any, override.value())
        text = override.input_line or key
        annotation = annotation_of(schema, key)
        if annotation is None:
            group = nearest(key, groups) if "." not in key else None
            if group is None:
                raise unknown_key(key, schema, text=text)
            raise ConfigError(
                text, "an unknown key", "a key of the configuration", f"did you mean {group}=...?"
            )
        if unwrap(annotation)[0] is str and value is not None and not isinstance(value, str):
            value = text.partition("=")[2]  # run.name=007 is text as it stands
        merges = is_section(annotation) and isinstance(value, dict)
        in_mapping = is_mapping(annotation_of(schema, key.rpartition(".")[0]))
        return _Value(key, value, text, merges, in_mapping)

    def put(self, tree: Tree, groups: Mapping[str, Group], choices: Sequence[str]) -> None:
        """Lay the value over the tree, in place."""
        *parents, name = self.key.split(".")
        node = tree
        for depth, parent in enumerate(parents, 1):
            if node.get(parent) is None:
                if not (self.in_mapping and depth == len(parents)):
                    raise _switched_off(".".join(parents[:depth]), self.text, groups, choices)
                node[parent] = {}
            node = cast(Tree, node[parent])
        if self.merges and isinstance(node.get(name), dict):
            node[name] = _merge(cast(Tree, node[name]), cast(Tree, self.value))
        else:
            node[name] = self.value


def _switched_off(
    section: str, text: str, groups: Mapping[str, Group], choices: Sequence[str]
) -> ConfigError:
    """The error for an override below a section that is null: nothing is ignored in silence."""
    name = section.rpartition(".")[2]
    for group in groups.values():
        if group.takes_list and name in group.options:
            chosen = [c.partition("=")[2].strip("[]") for c in choices if c.startswith(f"{group.name}=")]
            both = ",".join(part for part in (*chosen[-1:], name) if part)
            fix = f"add {group.name}=[{both}]"
            return ConfigError(text, f"{name} switched off", f"{name} among {group.name}=[...]", fix)
        if section == f"{group.name}.{name}" and name in group.options:
            return ConfigError(text, f"{section} is null", f"{group.name}={name}", f"add {group.name}={name}")
    return ConfigError(text, f"{section} is null", "a section", f"set {section}={{...}}")


def _merge(base: Tree, over: Tree) -> Tree:
    """`over` laid over `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merge(cast(Tree, below), cast(Tree, value)) if both else value
    return merged


def _resolve(tree: Tree, where: str) -> Tree:
    """Interpolations such as `runs/${run.name}` replaced by their values."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return cast(Tree, OmegaConf.to_container(OmegaConf.create(tree), resolve=True))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or where
        fix = "name an existing key, or escape the dollar sign: \\${...}"
        raise ConfigError(str(key), _one_line(error), "an interpolation that resolves", fix) from None


def _one_line(error: Exception) -> str:
    """The first line of a library's message; the rest is about its own insides."""
    return str(error).strip().partition("\n")[0].rstrip(".")
