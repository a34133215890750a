"""Between a tree of frozen dataclasses and a tree of plain values, with every mistake named by its key.

OmegaConf's own structured configs are not used: it makes frozen dataclasses read-only nodes that cannot be
merged into, stops at the first mistake, and does not say what was expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from typing import Any, TypeVar, cast

from megafab.errors import ConfigError, ConfigErrors

T = TypeVar("T")
Tree = dict[str, Any]
MISSING = "???"  # omegaconf.MISSING: a value that has no default


@cache
def field_types(schema: type) -> Mapping[str, Any]:
    """The annotation of each field of a section, evaluated."""
    return typing.get_type_hints(schema)


def unwrap(annotation: Any) -> tuple[Any, bool]:
    """`X | None` as (X, True); any other annotation as (annotation, False)."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        inner = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        assert len(inner) == 1, f"{annotation}: a field is one type, or one type and None"
        return inner[0], True
    return annotation, False


def is_section(annotation: Any) -> bool:
    """Whether the annotation is a dataclass, that is a section with keys of its own."""
    return dataclasses.is_dataclass(unwrap(annotation)[0])


def is_mapping(annotation: Any) -> bool:
    """Whether the annotation is `dict[str, X]`: keys of the user's own choosing."""
    return typing.get_origin(unwrap(annotation)[0]) is dict


def keys(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All dotted keys below a section, sections included, with their annotations."""
    for name, annotation in field_types(schema).items():
        yield prefix + name, annotation
        if is_section(annotation):
            yield from keys(unwrap(annotation)[0], f"{prefix}{name}.")


def annotation_of(schema: type, key: str) -> Any:
    """The annotation of a dotted key, or None when there is no such key."""
    annotation: Any = schema
    for name in key.split("."):
        if is_section(annotation):
            annotation = field_types(unwrap(annotation)[0]).get(name)
        elif is_mapping(annotation):
            annotation = typing.get_args(unwrap(annotation)[0])[1]
        else:
            return None
    return annotation


def default_tree(schema: type) -> Tree:
    """The defaults of a section; mandatory values are "???", optional sections None."""
    tree: Tree = {}
    hints = field_types(schema)
    for field in dataclasses.fields(schema):
        kind, optional = unwrap(hints[field.name])
        if dataclasses.is_dataclass(kind) and not optional:
            tree[field.name] = default_tree(cast(type, kind))
        elif field.default_factory is not dataclasses.MISSING:
            tree[field.name] = to_tree(field.default_factory())
        else:
            tree[field.name] = MISSING if field.default is dataclasses.MISSING else to_tree(field.default)
    return tree


def to_tree(value: Any) -> Any:
    """Plain values only: sections as dictionaries, enumerations as their names, tuples as lists."""
    if isinstance(value, Enum):
        return value.name
    if dataclasses.is_dataclass(value):
        return {field.name: to_tree(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_tree(item) for key, item in cast(Mapping[str, Any], value).items()}
    if isinstance(value, (list, tuple)):
        return [to_tree(item) for item in cast(Sequence[Any], value)]
    return value


def build(schema: type[T], tree: Tree) -> T:
    """The dataclass that a complete tree describes.

    Raises:
        ConfigErrors: unknown keys, values of the wrong type, mandatory values that nobody gave.
    """
    problems: list[ConfigError] = []
    value = _section(schema, tree, "", problems)
    if problems:
        raise ConfigErrors(problems)
    return value


def _section(schema: type[T], tree: Tree, prefix: str, problems: list[ConfigError]) -> T:
    hints = field_types(schema)
    for name in tree:
        if name not in hints:
            problems.append(unknown_key(prefix + name, schema, prefix))
    values = {
        name: _value(hints[name], tree[name], prefix + name, problems) for name in hints if name in tree
    }
    # After a problem the object is never used, but building it would fail on a field without a value.
    return schema(**values) if not problems else cast(T, None)


def _value(annotation: Any, value: Any, key: str, problems: list[ConfigError]) -> Any:
    kind, optional = unwrap(annotation)
    if value is None and optional:
        return None
    if value == MISSING:
        expected = expectation(annotation)
        problems.append(ConfigError(key, "no value", expected, f"add {key}=... to the command"))
        return None
    if is_section(kind) and isinstance(value, dict):
        return _section(cast(type[Any], kind), cast(Tree, value), f"{key}.", problems)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict and isinstance(value, dict):
        items = cast(Tree, value).items()
        return {str(name): _value(arguments[1], item, f"{key}.{name}", problems) for name, item in items}
    if origin in (list, tuple) and isinstance(value, list):
        elements = [
            _value(arguments[0], item, f"{key}[{i}]", problems)
            for i, item in enumerate(cast(list[Any], value))
        ]
        return elements if origin is list else tuple(elements)
    try:
        return _scalar(kind, value)
    except (TypeError, ValueError):
        fix = _type_fix(kind, value, key)
        problems.append(ConfigError(f"{key}={_shown(value)}", _found(value), expectation(annotation), fix))
        return None


def _scalar(kind: Any, value: Any) -> Any:
    """The value as an int, float, bool, str or member of an enumeration, where that loses nothing."""
    if kind is Any:
        return value  # the section's own code looks at it
    if isinstance(kind, type) and issubclass(kind, Enum):
        if isinstance(value, str) and value in kind.__members__:
            return kind[value]
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif isinstance(value, bool):
        pass  # a bool is an int in Python, not to a user
    elif kind is int:
        if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
            return int(value)  # 1e9 tokens
    elif kind is float:
        if isinstance(value, (int, float)):
            return float(value)
    elif kind is str and isinstance(value, (str, int)):
        return str(value)
    raise TypeError


def expectation(annotation: Any) -> str:
    """What a key of this type takes, in words."""
    kind, optional = unwrap(annotation)
    return _kind_in_words(kind) + (" or null" if optional else "")


def _kind_in_words(kind: Any) -> str:
    if is_section(kind):
        return "a section with keys " + ", ".join(field_types(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(kind.__members__)
    if typing.get_origin(kind) is dict:
        return "a mapping like {name: value}, each value " + _kind_in_words(typing.get_args(kind)[1])
    if typing.get_origin(kind) in (list, tuple):
        return "a list like [a, b]"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", Any: "a value"}[
        kind
    ]


def _type_fix(kind: Any, value: Any, key: str) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return did_you_mean(str(value), kind.__members__, prefix=f"{key}=") or f"choose one of them for {key}"
    if kind is bool:
        return f"{key}=true or {key}=false"
    return f"give {key} {_kind_in_words(kind)}"


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _found(value: Any) -> str:
    names: dict[Any, str] = {
        str: "text",
        int: "the whole number",
        float: "the number",
        bool: "the truth value",
    }
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return f"{names.get(type(value), 'the value')} {_shown(value)}"


def unknown_key(key: str, schema: type, section: str = "", *, text: str | None = None) -> ConfigError:
    """The error for a key that does not exist, with the nearest one that does.

    Args:
        key: the dotted key as the user wrote it, below `section`.
        schema: the dataclass to search.
        section: dotted prefix of `schema`'s own keys, ending in a dot.
        text: what the user typed, when that is more than the key.
    """
    annotations = {section + name: annotation for name, annotation in keys(schema)}
    known = list(annotations)
    fix = did_you_mean(key, [name for name in known if not is_section(annotations[name])])
    if fix is None:
        parent = key.rpartition(".")[0]
        while parent and parent not in known:
            parent = parent.rpartition(".")[0]
        names = [name for name in known if name.rpartition(".")[0] == (parent or section.rstrip("."))]
        fix = f"use one of {', '.join(names)}"
    return ConfigError(text or key, "an unknown key", "a key of the configuration", fix)


def did_you_mean(word: str, known: Iterable[str], *, prefix: str = "") -> str | None:
    """A remedy naming the nearest known word, or None when nothing is near."""
    near = nearest(word, known)
    return f"did you mean {prefix}{near}?" if near else None


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`, whole or by its last part, or None when nothing is like it.

    `step` and `train.lr` find `train.steps` and `optim.lr`; of two alike, that of the word's own section.
    """

    def likeness(name: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, word, name).ratio()
        last = difflib.SequenceMatcher(None, word.rpartition(".")[2], name.rpartition(".")[2]).ratio()
        same_section = word.rpartition(".")[0] == name.rpartition(".")[0]
        return last + 0.1 if same_section else max(whole, last), whole

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= 0.6 else None
