"""Checkpoints on disk: logical tensors and a JSON state, committed whole or not at all.

    <run.dir>/checkpoints/
        latest                      name of the newest checkpoint, for people and scripts
        step_00000100/              appears by one rename, when everything in it is on the disk
            manifest.json           written last: size and XXH3 hash of every other file, order of commits
            state.json              progress, data order, techniques, configuration (`state.py`)
            tensors/                torch.distributed.checkpoint format, one file a rank
        .step_00000200.tmp-1f3a9c/  a save under way, or the leftovers of a dead one: removed by the next save

Bool tensors, the masks of sparse models, are stored a bit an element (`files.py`).

Tensors are never gathered: each rank writes the pieces it owns and reads the boxes it needs, whatever the
number of ranks was when they were written (`dcp.py`, `files.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megafab.checkpoint import dcp, provenance
from megafab.checkpoint.files import HASH, Entry, FileReader, entry, hash_of
from megafab.checkpoint.pieces import MASK, LogicalTensor
from megafab.checkpoint.team import Team
from megafab.errors import UserError

FORMAT = 2
MANIFEST, STATE, TENSORS, LATEST = "manifest.json", "state.json", "tensors", "latest"
WEIGHT = "weight/"  # what engines put before the global name of an fp32 master
TECHNIQUES = "techniques/"  # what stands before a technique's name and the names of its tensors

log = logging.getLogger(__name__)


def save(
    directory: Path,
    step: int,
    tensors: Mapping[str, LogicalTensor],
    state: Mapping[str, Any],
    *,
    keep: int,
    keep_every: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write one checkpoint and, once it is committed, delete those that are kept no longer. A collective.

    When it returns, on any rank, the checkpoint is on the disk. When it raises, the directory is as it was
    before. A checkpoint of the same step is replaced.

    It is checked before anything older goes: the manifest is read back, and every file has the size that
    its writer counted. Content is hashed on its way to the disk, not read back: a read would be answered
    from memory and say nothing of the disk. It is hashed again when a run resumes from it.

    Args:
        directory: `<run.dir>/checkpoints`, on a filesystem that all ranks share.
        step: names the checkpoint.
        tensors: this rank's part of every logical tensor it holds.
        state: JSON-able; that of rank 0 is written.
        keep: newest checkpoints to keep, at least 1; one that is damaged does not count.
        keep_every: steps that are multiples of it are kept for ever; 0: none.
        group: see `Team`.

    Raises:
        UserError: on all ranks, when any of them cannot write.
    """
    assert keep >= 1
    team = Team(group)
    draft = team.one(lambda: begin(directory, step))
    try:
        written = dcp.write(draft / TENSORS, dcp.PieceSavePlanner(tensors), team)
        files = {name: made for part in team.each(lambda: written) for name, made in part.items()}
        return team.one(
            lambda: commit(draft, step, files, state, keep=keep, ranks=team.size, keep_every=keep_every)
        )
    except BaseException:
        if team.leads:
            shutil.rmtree(draft, ignore_errors=True)
        raise


def load(path: Path, tensors: Mapping[str, LogicalTensor], *, group: dist.ProcessGroup | None = None) -> None:
    """Fill the pieces of `tensors`, in place, from the checkpoint at `path`. A collective.

    The pieces may be cut differently from those that were saved, on any number of ranks. Tensors of the
    checkpoint that nobody asks for are left alone.

    Raises:
        UserError: on all ranks; a tensor is missing or has another shape or type.
    """
    dcp.read(path / TENSORS, tensors, Team(group))


def path_of(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return directory / f"step_{step:08d}"


def tensor_names(path: Path) -> list[str]:
    """The names of all tensors of the checkpoint at `path`."""
    return list(FileReader(path / TENSORS).read_metadata().state_dict_metadata)


def masks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Of the names of a checkpoint's tensors those of masks: the technique whose it is, and the parameter."""
    found = {}
    for name in names:
        technique, _, inner = name.removeprefix(TECHNIQUES).partition("/")
        if name.startswith(TECHNIQUES) and inner.startswith(MASK):
            found[name] = technique, inner.removeprefix(MASK)
    return found


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of the checkpoint at `path`."""
    return json.loads((path / STATE).read_text())


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`.

    Raises:
        UserError: there is none, it is damaged, or a version with another format wrote it.
    """
    where = str(path / MANIFEST)
    fix = "name a directory `step_XXXXXXXX` that a save has finished"
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        written, intact = manifest["format"], sealed(manifest) == manifest
    except OSError as error:
        raise UserError(where, error.strerror or str(error), "a committed checkpoint", fix) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(where, "damaged content", "a manifest as `save` writes it", fix) from error
    if written != FORMAT:
        found = f"format {written}, of another version of megafab"
        raise UserError(where, found, f"format {FORMAT}", "go on with the version that wrote it")
    if not intact:
        raise UserError(where, "damaged content", "a manifest as `save` writes it", fix)
    return manifest


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """`manifest` with the hash of its own content, by which a change of any of its values shows."""
    content = {key: value for key, value in manifest.items() if key != "seal"}
    text = json.dumps(content, sort_keys=True)
    return {**content, "seal": hashlib.sha256(text.encode()).hexdigest()}


def quick_check(path: Path) -> dict[str, str]:
    """What is wrong with the checkpoint at `path`, by file, as far as the manifest and file sizes tell."""
    try:
        files = read_manifest(path)["files"]
    except UserError as error:
        return {MANIFEST: f"found {error.found}, expected {error.expected}"}
    problems = {name: _wrong_size(path / name, described["size"]) for name, described in files.items()}
    return {name: problem for name, problem in problems.items() if problem}


def verify(path: Path, *, part: int = 0, parts: int = 1) -> dict[str, str]:
    """What is wrong with the checkpoint at `path`, by file: sizes, then XXH3 of all content.

    With `parts` ranks, each hashes only the files of its `part`; together they cover all.
    """
    problems = quick_check(path)
    if MANIFEST in problems:
        return problems
    files = read_manifest(path)["files"]
    for name in sorted(files)[part::parts]:
        if name not in problems:
            found, expected = hash_of(path / name), files[name][HASH]
            if found != expected:
                problems[name] = f"XXH3 {found[:12]}..., expected {expected[:12]}..."
    return problems


def candidates(directory: Path) -> list[Path]:
    """Checkpoints in `directory`, the last committed first.

    The order is that of commits, not of steps: a run that went back to an early checkpoint continues from
    what it saved since. Those whose manifest is damaged or missing come first, to be reported by a check: a
    save names a directory `step_*` only when its manifest is there.
    """
    ranked = []
    for path in directory.glob("step_*"):
        manifest = _manifest_or_none(path)
        ranked.append((float("inf") if manifest is None else manifest["commit"], path))
    return [path for _, path in sorted(ranked, reverse=True)]


def discard_after(directory: Path, step: int) -> None:
    """Delete the checkpoints of steps after `step`, to which a run that has gone back does not come."""
    for path in candidates(directory):
        if step_of(path) > step:
            _discard(path)


def step_of(path: Path) -> int:
    """The step of the checkpoint at `path`."""
    return int(path.name.removeprefix("step_"))


def check_latest(directory: Path) -> str:
    """What is wrong with the pointer `latest` in `directory`, which has checkpoints; empty: nothing.

    Nothing is read through it. It may name an older checkpoint: a save was killed before it moved.
    """
    try:
        name = (directory / LATEST).read_text().removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        name = getattr(error, "strerror", None) or "damaged content"
    else:
        if (directory / name / MANIFEST).exists() and name.startswith("step_"):
            return ""
    return f"{directory / LATEST}: found {name!r}, expected the name of a checkpoint beside it"


def first_intact(
    paths: Sequence[Path], check: Callable[[Path], Mapping[str, str]]
) -> tuple[Path | None, list[str]]:
    """The first path that `check` finds nothing wrong with, and what is wrong with those before it.

    Raises:
        UserError: there are checkpoints and all are damaged. Starting afresh would hide that.
    """
    damaged = []
    for path in paths:
        problems = check(path)
        if not problems:
            return path, damaged
        damaged.append(f"{path}: " + "; ".join(f"{name}: {what}" for name, what in problems.items()))
    if damaged:
        raise UserError(
            str(paths[0].parent),
            f"only damaged checkpoints ({' | '.join(damaged)})",
            "one intact checkpoint",
            "restore the files; checkpoint.resume=none starts afresh in another run.dir",
        )
    return None, damaged


def newest(directory: Path) -> Path | None:
    """The last committed checkpoint in `directory` that passes the quick check, or None if there is none.

    Logs a warning for every damaged one it passes over.

    Raises:
        UserError: see `first_intact`.
    """
    path, damaged = first_intact(candidates(directory), quick_check)
    for message in damaged:
        log.warning("passing over a damaged checkpoint: %s", message)
    return path


def locate(where: Path, *, key: str = "checkpoint.resume") -> list[Path]:
    """The checkpoints that `where` names: a step directory, or the candidates of a run directory.

    Args:
        where: the directory.
        key: of the configuration, that named it.

    Raises:
        UserError: there is none.
    """
    found: list[Path] = []
    if (where / MANIFEST).exists():
        found = [where]
    elif where.is_dir():
        found = candidates(where / "checkpoints") or candidates(where)
    if not found:
        raise UserError(
            f"{key}={where}",
            "no checkpoint there" if where.exists() else "no such directory",
            "a directory `step_XXXXXXXX` with a manifest.json, or a run directory that has checkpoints",
            "correct the path",
        )
    return found


# Committing.


def begin(directory: Path, step: int) -> Path:
    """Remove what dead saves left, and make the directory of this one; tensors go into its `TENSORS`."""
    for leftover in directory.glob(".step_*.tmp-*"):
        shutil.rmtree(leftover)
    draft = _aside(directory, step)
    (draft / TENSORS).mkdir(parents=True)
    return draft


def _aside(directory: Path, step: int) -> Path:
    return directory / f".step_{step:08d}.tmp-{uuid.uuid4().hex[:6]}"


def commit(
    draft: Path,
    step: int,
    files: Mapping[str, Entry],
    state: Mapping[str, Any],
    *,
    keep: int,
    ranks: int,
    keep_every: int = 0,
) -> Path:
    """Make a checkpoint of what `begin` made and tensors were written into; returns it. On one process.

    Args:
        draft: the directory.
        step: names the checkpoint.
        files: size and hash of all files of tensors, by their names in the draft.
        state: JSON-able.
        keep, keep_every: see `save`.
        ranks: that wrote.

    Raises:
        UserError: not all of the files are there; the draft stays.
        OSError: the disk is full, or lost.
    """
    directory = draft.parent
    _write(draft / STATE, json.dumps(state, indent=1))
    files = {**files, STATE: entry(draft / STATE)}
    for name, described in files.items():
        if _wrong_size(draft / name, described["size"]):
            raise UserError(
                f"run.dir, {draft / name}",
                "a file that another rank wrote but rank 0 does not see",
                "a filesystem that all nodes share",
                "point run.dir at one",
            )
    older = candidates(directory)
    commits = [m["commit"] for m in map(_manifest_or_none, older) if m is not None]
    manifest = {
        "format": FORMAT,
        "step": step,
        "commit": 1 + max(commits, default=0),
        "ranks": ranks,
        "torch": torch.__version__,
        "written_at": provenance.now(),
        "files": files,
    }
    _write(draft / MANIFEST, json.dumps(sealed(manifest), indent=1))
    _sync_directory(draft / TENSORS)
    _sync_directory(draft)
    problems = quick_check(draft)
    if problems:
        name, problem = next(iter(problems.items()))
        raise UserError(str(draft / name), problem, "what was just written", "check the disk")
    final = path_of(directory, step)
    if final.exists():
        final.rename(_aside(directory, step))
    draft.rename(final)
    _sync_directory(directory)
    # Committed: what follows is housekeeping, whose failure must not be taken for that of the save.
    try:
        _point_latest(directory, final.name)
        for path in _expired(directory, keep, keep_every):
            _discard(path)
        for replaced in directory.glob(".step_*.tmp-*"):
            shutil.rmtree(replaced)
    except OSError as error:
        log.warning("saved %s, but could not tidy up %s: %s", final, directory, error)
    return final


def _expired(directory: Path, keep: int, keep_every: int) -> list[Path]:
    """Checkpoints older than the `keep` newest sound ones, but for every `keep_every`-th step.

    One whose manifest is damaged has no place in the order: it is left for the user to look at.
    """
    expired, sound = [], 0
    for path in candidates(directory):
        if sound < keep:
            sound += not quick_check(path)
        elif not keep_every or step_of(path) % keep_every:
            expired.append(path)
    return expired


def _manifest_or_none(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(UserError):
        return read_manifest(path)
    return None


def _point_latest(directory: Path, name: str) -> None:
    draft = directory / f".{LATEST}.tmp"
    _write(draft, name + "\n")
    draft.rename(directory / LATEST)
    _sync_directory(directory)


def _discard(path: Path) -> None:
    """Delete a checkpoint; it stops being one at once, not file by file."""
    hidden = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:6]}")
    path.rename(hidden)
    shutil.rmtree(hidden)


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Make the names in a directory durable, as `fsync` of a file does its content."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _wrong_size(path: Path, size: int) -> str:
    try:
        found = path.stat().st_size
    except OSError as error:
        return error.strerror or str(error)
    return "" if found == size else f"{found} bytes, expected {size}"
