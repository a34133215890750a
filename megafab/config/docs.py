"""The keys that `--help` lists; the comments beside the dataclasses' fields are the documentation."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from enum import Enum
from typing import Any, NamedTuple, cast

from megafab.config.tree import annotation_of, default_tree, is_section, keys, unwrap


class KeyDoc(NamedTuple):
    """One key: what it takes, its default as one would type it, and what it means."""

    key: str
    takes: str
    default: str
    text: str


def key_docs(schema: type) -> Iterator[KeyDoc]:
    """All keys of a configuration in the order of its sections."""
    sections: dict[str, dict[str, str]] = {"": _comments(schema)}
    for key, annotation in keys(schema):
        parent, _, name = key.rpartition(".")
        text = sections[parent].get(name, "")
        if is_section(annotation):
            sections[key] = _comments(unwrap(annotation)[0])
        else:
            yield KeyDoc(key, _takes(annotation), _default(schema, key), text)


def _takes(annotation: Any) -> str:
    kind = unwrap(annotation)[0]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(kind.__members__)
    return cast(Any, kind).__name__


def _default(schema: type, key: str) -> str:
    value: Any = default_tree(schema)
    section: Any = schema
    for name in key.split("."):
        if value is None:  # below a section that is off, such as a technique's
            value = default_tree(unwrap(section)[0])
        value, section = value[name], annotation_of(unwrap(section)[0], name)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _comments(section: type) -> dict[str, str]:
    """The comment behind each field of a dataclass, or else the comment lines right above it."""
    source = textwrap.dedent(inspect.getsource(section))
    lines = source.splitlines()
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above: list[str] = []
            line = node.lineno - 1
            while lines[line - 1].lstrip().startswith("#"):
                above.insert(0, comments[line])
                line -= 1
            found[node.target.id] = comments.get(node.end_lineno or node.lineno, " ".join(above))
    return found
