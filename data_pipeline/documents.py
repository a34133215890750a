"""Bytes to documents: decompression, decoding, JSON, and what is said about input that is bad."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megafab.errors import UserError

_READ = 1 << 20
SKIP = "or count and skip bad documents with skip_bad=true"


@dataclass(frozen=True, slots=True)
class Bad:
    """A document that cannot be used: why in a word or two for the counts, and the full line."""

    reason: str
    error: UserError


Document = str | Bad


def from_line(line: bytes, where: Callable[[], str], text_key: str) -> Document:
    """The text of one JSONL line; `where` names file and line and is called only if the line is bad."""
    fix = f"repair or delete the line, {SKIP}"
    expected = f'one JSON object a line with a string "{text_key}"'
    if not line.strip():
        return Bad("empty line", UserError(where(), "an empty line", expected, fix))
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return _not_utf8(error, where(), fix)
    except (ValueError, RecursionError) as error:
        cut = "" if line.rstrip().endswith(b"}") else "; is the line truncated?"
        reason = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else error
        found = f"invalid JSON ({reason}{cut})"
        return Bad("invalid JSON", UserError(where(), found, expected, fix))
    if not isinstance(row, dict):
        found = f"a JSON {_json_type(row)}"
        return Bad("not a JSON object", UserError(where(), found, expected, fix))
    if text_key not in row:
        return no_text_key(where(), list(row), text_key)
    return from_value(row[text_key], where, text_key)


def no_text_key(where: str, keys: list[str], text_key: str) -> Bad:
    """A row without the key that should hold its text."""
    found = f"no key {text_key!r}, only {', '.join(map(repr, keys[:10])) or 'none at all'}"
    fix = f"text_key=KEY with one of these keys, {SKIP}"
    return Bad("no text key", UserError(where, found, f"a string under text_key={text_key}", fix))


def from_value(value: Any, where: Callable[[], str], text_key: str) -> Document:
    """A text that came out of a row: it must be a string, and valid Unicode."""
    if not isinstance(value, str):
        found = f"a {_json_type(value)} under {text_key!r}"
        fix = f"repair or delete the row, {SKIP}"
        return Bad("text is not a string", UserError(where(), found, "a string", fix))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = f"half a surrogate pair (U+{ord(value[error.start]):04X}) at character {error.start}"
        fix = f"repair or delete the document, {SKIP}"
        return Bad("invalid Unicode", UserError(where(), found, "valid Unicode", fix))
    return value


def from_file(path: str) -> Document:
    """A whole text file as one document, decompressed if its name says so."""
    try:
        return b"".join(blocks(path)).decode()
    except UserError as error:
        return Bad("damaged file", error)
    except UnicodeDecodeError as error:
        fix = f"convert it to UTF-8, leave it out (a glob such as 'DIR/**/*.txt' selects files), {SKIP}"
        return _not_utf8(error, path, fix)


def _not_utf8(error: UnicodeDecodeError, where: str, fix: str) -> Bad:
    found = f"byte 0x{error.object[error.start]:02X} at byte offset {error.start}, which is not UTF-8"
    return Bad("not UTF-8", UserError(where, found, "UTF-8 text", fix))


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number" if isinstance(value, (int, float)) else type(value).__name__)


def blocks(path: str, position: Callable[[int], None] = lambda _: None) -> Iterator[bytes]:
    """The content of a file in blocks, decompressed if it ends in .gz or .zst.

    Args:
        path: the file.
        position: told how many bytes of the file itself were read so far, before each block.

    Raises:
        UserError: a compressed file that is damaged or ends too early.
    """
    kind = Path(path).suffix
    with open(path, "rb") as file:
        if kind == ".gz":
            yield from _gunzip(path, file, position)
        elif kind == ".zst":
            yield from _unzstd(path, file, position)
        else:
            while block := file.read(_READ):
                position(file.tell())
                yield block


def _gunzip(path: str, file: BinaryIO, position: Callable[[int], None]) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file) as stream:
            while block := stream.read(_READ):
                position(file.tell())
                yield block
    except EOFError:
        raise _damaged(path, "a truncated gzip file", "a complete one") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, f"a damaged gzip file ({error})", "a file that gzip can decompress") from None


def _unzstd(path: str, file: BinaryIO, position: Callable[[int], None]) -> Iterator[bytes]:
    zstandard = optional_import("zstandard", path)
    # The library's stream reader takes a truncated file for a complete one, hence frame by frame.
    frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    try:
        while data := file.read(_READ >> 3):
            position(file.tell())
            while data:
                begun = True
                if block := frame.decompress(data):
                    yield block
                data = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    except zstandard.ZstdError as error:
        raise _damaged(path, f"a damaged zstd file ({error})", "a file that zstd can decompress") from None
    if begun:
        raise _damaged(path, "a truncated zstd file", "a complete one")


def _damaged(path: str, found: str, expected: str) -> UserError:
    return UserError(path, found, expected, "download or compress the file again, or leave it out")


def optional_import(module: str, needed_for: str) -> Any:
    """A package of the `data` extra; UserError with the install command when it is missing."""
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = error.name or module
        fix = f'pip install {package}, or pip install "megafab[data]"'
        raise UserError(
            needed_for, f"that {package} is not installed", f"{package} to read it", fix
        ) from None
