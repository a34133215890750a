"""Where something is built: a directory beside the result, which appears by one rename when it is complete.

A build that was killed continues: what it finished is kept as long as the request is the same.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from data_pipeline.pool import Interrupted
from megafab.data.derived import Kind
from megafab.errors import UserError

_LOCK = "lock"
_ENVIRONMENT = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO}


@contextmanager
def outages_interrupt(out: Path) -> Generator[None]:
    """What the machine failed at (disk full, no permission) is an `Interrupted` that can be continued."""
    try:
        yield
    except OSError as error:
        if error.errno not in _ENVIRONMENT:
            raise
        where = str(error.filename or out)
        fix = "mend that and run the same command again, it continues where it stopped"
        raise Interrupted(
            where, f"'{os.strerror(error.errno)}'", "readable input, room for output", fix
        ) from None


def is_finished(kind: Kind, out: Path, request: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether the derived directory `out` already is the one asked for.

    Raises:
        UserError: it is something else.
    """
    if not out.exists() or overwrite:
        return False
    there = kind.read(out).get("request")
    if there != request:
        changed = ", ".join(key for key in request if (there or {}).get(key) != request[key])
        found, expected = f"a {kind.format} made from another request ({changed})", "the same request"
        raise UserError(str(out), found, expected, "another name, or overwrite=true to replace it")
    print(f"{out} is finished. Nothing to do (overwrite=true builds it again).")
    return True


def save_array(path: Path, array: np.ndarray) -> None:
    """The file appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
    os.replace(temporary, path)


class Workspace:
    """The directory beside `out` where a build happens. One build at a time; kept when it is interrupted.

    `pieces` has its finished parts, `result` what `publish` gives the name of `out`. With `shared`, several
    commands, on several machines too, make parts at the same time; none of them publishes or tidies up.
    """

    def __init__(self, out: Path, request: Mapping[str, Any], *, shared: bool = False) -> None:
        self._out = out = out.absolute()
        self.root = out.with_name(f".{out.name}.building")
        self.pieces, self.result = self.root / "pieces", self.root / "result"
        self._request, self._shared = json.dumps(request), shared

    def __enter__(self) -> Workspace:
        self.root.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.root / _LOCK, "w")  # noqa: SIM115
        request = self.root / "request.json"
        if self._shared:
            with self.exclusive("request"):  # the first of them finds nobody else here
                self._hold(fcntl.LOCK_SH)
                self._join(request)
            return self
        self._hold(fcntl.LOCK_EX)
        leftovers = request.read_text() if request.exists() else None
        if leftovers is not None and leftovers != self._request:
            print(f"{self.root} has leftovers of a build of another request: starting over")
            self._clear()
        elif leftovers is not None:
            print(f"continuing the interrupted build in {self.root}")
        self.pieces.mkdir(exist_ok=True)
        for part in self.pieces.glob("*.tmp"):
            part.unlink()
        shutil.rmtree(self.result, ignore_errors=True)
        request.write_text(self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shared:
            self._lock.close()
            return
        # After bad input the next request is another one: the input, or the configuration, has to change.
        if kind is None or (issubclass(kind, UserError) and not issubclass(kind, Interrupted)):
            shutil.rmtree(self.root)
        self._lock.close()

    @contextmanager
    def exclusive(self, name: str) -> Generator[None]:
        """One of the commands that share the directory at a time; the others wait."""
        with open(self.root / f"{name}.{_LOCK}", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _hold(self, kind: int) -> None:
        try:
            fcntl.flock(self._lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            found, fix = "another build at work there", "wait for it, or stop it"
            raise UserError(str(self.root), found, "one at a time", fix) from None

    def _join(self, request: Path) -> None:
        """Begin the work on a request, or take part in it."""
        leftovers = request.read_text() if request.exists() else None
        if leftovers is not None and leftovers != self._request:
            self._hold(fcntl.LOCK_EX)  # or they are of a build that is under way
            print(f"{self.root} has leftovers of a build of another request: starting over")
            self._clear()
            self._hold(fcntl.LOCK_SH)
        self.pieces.mkdir(exist_ok=True)
        request.write_text(self._request)

    def publish(self) -> None:
        """Give the finished result its name. A reader finds the old one, none, or the new one."""
        old = self._out.with_name(f".{self._out.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        if self._out.exists():
            os.replace(self._out, old)
        os.replace(self.result, self._out)
        shutil.rmtree(old, ignore_errors=True)

    def _clear(self) -> None:
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif not path.name.endswith(_LOCK):
                path.unlink()
