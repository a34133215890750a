"""What was computed from a corpus and is kept below it: a directory whose manifest is written last.

    <corpus>/<folder>/<name>/manifest.json        format, corpus, what it was made with, fingerprint

The manifest is what makes the directory count, and names the corpus it belongs to by fingerprint. Only the
standard library is needed here: a configuration is checked against it without torch or numpy.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafab.errors import UserError

MANIFEST = "manifest.json"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # of a domain or a derived directory: files are named by it


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of derived directory.

    `folder` is its place below the corpus, `format` how its manifest begins, `keys` what a manifest must
    have, `make` the command that makes one.
    """

    folder: str
    format: str
    keys: tuple[str, ...]
    make: str

    def directory(self, corpus: Path, name: str) -> Path:
        """Where `name` is: a name has its place below the corpus, a path (with a separator) is itself."""
        return Path(name) if os.sep in name else corpus / self.folder / name

    def read(self, directory: Path) -> dict[str, Any]:
        """The manifest of a finished directory.

        Raises:
            UserError: none there, or one that cannot be used.
        """
        path = directory / MANIFEST
        try:
            manifest = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            found = "one that is not finished" if directory.is_dir() else "no such directory"
            raise UserError(str(directory), found, f"a finished {self.format}", self.make) from None
        except ValueError as error:
            found = f"invalid JSON ({error})"
            raise UserError(str(path), found, f"the manifest of a {self.format}", self.make) from None
        if not isinstance(manifest, dict) or manifest.get("format") != self.format:
            found = "the manifest of something else"
            raise UserError(str(path), found, f"the manifest of a {self.format}", self.make)
        missing = [key for key in ("corpus", "fingerprint", *self.keys) if key not in manifest]
        if missing:
            raise UserError(str(path), f"no {', '.join(missing)}", f"a {self.format}", self.make)
        return manifest

    def write(self, directory: Path, content: Mapping[str, Any]) -> None:
        """Commits the directory: its manifest appears whole, or not at all.

        The fingerprint is that of `content`, which should have a hash of what the directory's files hold.
        """
        assert content.keys() >= {"corpus", *self.keys}, content.keys()
        manifest = {"format": self.format, **content, "fingerprint": fingerprint(content)}
        path = directory / MANIFEST
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            file.write(json.dumps(manifest, indent=1).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def require_corpus(self, directory: Path, manifest: Mapping[str, Any], corpus: str) -> None:
        """Refuses a directory that was made from another corpus than the one with this fingerprint."""
        if manifest["corpus"] != corpus:
            raise UserError(
                str(directory),
                f"a {self.format} of the corpus {manifest['corpus'][:12]}",
                f"one of the corpus {corpus[:12]}",
                self.make,
            )


SCORES = Kind(
    folder="scores",
    format="megafab-scores",
    keys=("checkpoint", "seq_len", "packing"),
    make="make it: megafab score",
)
DIFFICULTY = Kind(
    folder="difficulty",
    format="megafab-difficulty",
    keys=("metric", "seq_len", "windows"),
    make="make it: megafab data difficulty",
)
RETRIEVAL = Kind(
    folder="retrieval",
    format="megafab-retrieval",
    keys=("tokenizer", "chunk", "rows", "encoder", "dim", "index", "search", "shard_rows", "sha256"),
    make="make it: megafab data retrieval",
)
NEIGHBORS = Kind(
    folder="neighbors",
    format="megafab-neighbors",
    keys=("tokenizer", "database", "database_fingerprint", "chunk", "neighbors", "candidates", "sha256"),
    make="make it: megafab data retrieval",
)


def fingerprint(content: Mapping[str, Any]) -> str:
    """sha256 of what is JSON-able."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
