"""The default corpus: the Python standard library that runs us. It needs no network.

Domains: `code` (source files), `tests` (the library's own tests) and `prose` (docstrings, and the help
topics of `pydoc`). Linux distributions leave `Lib/test` out; then `tests` are those inside other
packages, and if there are none either, `encodings` and `asyncio` become domains of their own.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.documents import Bad, Document, from_file
from data_pipeline.pieces import Piece, TextFiles
from data_pipeline.sources import File, Source, group_by_size

_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "lib-dynload"}
_TESTS = {"test", "tests", "idle_test"}


@dataclass(frozen=True, slots=True)
class Docstrings:
    """A piece: the docstrings of modules, one document a module."""

    paths: tuple[str, ...]
    size: int

    def documents(self, text_key: str) -> Iterator[Document]:
        """See `pieces.Piece`."""
        for path in self.paths:
            text = from_file(path)
            if isinstance(text, Bad):
                yield text
            elif document := docstrings(text):
                yield document


@dataclass(frozen=True, slots=True)
class Topics:
    """A piece: the language reference as `pydoc` has it, a document a topic, up to `limit` characters."""

    limit: int
    size: int = 0

    def documents(self, text_key: str) -> Iterator[Document]:
        """See `pieces.Piece`."""
        from pydoc_data.topics import topics

        left = self.limit
        for name in sorted(topics):
            left -= len(topics[name])
            if left >= 0:
                yield topics[name]


@dataclass(frozen=True, slots=True)
class Library:
    """A source: files of the standard library, whole or their docstrings."""

    files: tuple[File, ...]
    prose: bool = False

    @property
    def size(self) -> int:
        """See `sources.Source`."""
        return sum(file.size for file in self.files)

    @property
    def seekable(self) -> bool:
        """See `sources.Source`."""
        return True

    def identity(self) -> Iterator[str]:
        """See `sources.Source`: Python's version and the files' sizes, not when they were installed."""
        yield f"python {platform.python_version()} prose={self.prose}"
        yield from (f"{file.name}\0{file.size}" for file in self.files)

    def pieces(self, text_key: str, skip_bad: bool) -> Iterator[Piece]:
        """See `sources.Source`."""
        if self.prose:
            yield Topics(self.size)
        kind = Docstrings if self.prose else TextFiles
        for files in group_by_size(self.files):
            yield kind(tuple(file.path for file in files), sum(file.size for file in files))


def docstrings(source: str) -> str:
    """All docstrings of a module in the order of its text, a blank line between them; "" if it has none."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""  # the library's tests of the parser
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found = (ast.get_docstring(node) for node in nodes)
    return "\n\n".join(text for text in found if text)


def standard_library(limit: int) -> dict[str, list[Source]]:
    """The default domains, each made from at most `limit` bytes of files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    groups: dict[str, list[File]] = {"code": [], "tests": []}
    for path in _modules(root):
        name = path.relative_to(root)
        if size := path.stat().st_size:
            domain = "tests" if _TESTS & set(name.parts[:-1]) else "code"
            groups[domain].append(File(str(path), name.as_posix(), size, 0))
    if not groups["tests"]:
        del groups["tests"]
        code = groups["code"]
        for package in ("asyncio", "encodings"):
            groups[package] = [file for file in code if file.name.startswith(f"{package}/")]
        groups["code"] = [file for file in code if file.name.split("/")[0] not in groups]
    chosen = {domain: _choose(files, limit) for domain, files in groups.items()}
    domains: dict[str, list[Source]] = {domain: [Library(files)] for domain, files in chosen.items()}
    return {**domains, "prose": [Library(chosen["code"], prose=True)]}


def _modules(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _LEFT_OUT)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def _choose(files: Iterable[File], limit: int) -> tuple[File, ...]:
    """Files up to `limit` bytes, from everywhere: by the hash of their names."""
    chosen = []
    for file in sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest()):
        if file.size <= limit:
            limit -= file.size
            chosen.append(file)
    return tuple(sorted(chosen, key=lambda file: file.name))
