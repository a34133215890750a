"""A function of the user's own, named by where it is: `package.module:function`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

from megafab.errors import UserError

FORM = "package.module:function"
_PATTERN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_named(name: str) -> bool:
    """Whether `name` has the form of a function's; nothing is imported."""
    return _PATTERN.fullmatch(name) is not None


def load_function(key: str, name: str) -> Callable[..., Any]:
    """The function that `key=name` asks for. What its module raises when it is imported goes through.

    Raises:
        UserError: no such module, or nothing to call by that name in it.
    """
    where, expected = f"{key}={name}", f"a function as {FORM}"
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and misses another
        fix = "put its directory into PYTHONPATH, or correct the name"
        raise UserError(where, f"no module {error.name}", expected, fix) from None
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(where, f"no function {attribute} in {module.__file__}", expected, "correct the name")
    return function
