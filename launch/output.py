"""Files that a verb leaves for people."""

from __future__ import annotations

from pathlib import Path

from megafab.errors import UserError


def write(path: Path, text: str) -> None:
    """Writes a verb's `out`.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        found = error.strerror or type(error).__name__
        raise UserError(f"out={path}", found, "a file to write", "choose another out=") from error
