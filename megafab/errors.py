"""Errors meant for the person at the keyboard.

Everything a user can get wrong raises `UserError` (or its subclass `ConfigError`) with one line that
says which key or file, what was found, what was expected and how to fix it. The command line prints
that line alone and exits with code 2; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class UserError(ValueError):
    """One line for the user: the key or file, what was found, what was expected, the fix.

    Args:
        where: the config key (`parallel.tensor=3`) or the file at fault.
        found: what is there.
        expected: what should be there.
        fix: what to type or do.
    """

    def __init__(self, where: str, found: str, expected: str, fix: str) -> None:
        super().__init__(f"{where}: found {found}, expected {expected}. Fix: {fix}")
        self.where, self.found, self.expected, self.fix = where, found, expected, fix

    def __reduce__(self) -> tuple[Any, Any]:
        # Exceptions cross process boundaries (data workers); the default rebuilds from str(self).
        return type(self), (self.where, self.found, self.expected, self.fix)


class ConfigError(UserError):
    """A `UserError` about the configuration."""


class ConfigErrors(ConfigError):
    """Several configuration errors at once, one a line, so that nobody queues once per mistake."""

    def __init__(self, problems: Sequence[ConfigError]) -> None:
        first = problems[0]
        super().__init__(first.where, first.found, first.expected, first.fix)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)

    def __reduce__(self) -> tuple[Any, Any]:
        return type(self), (self.problems,)
