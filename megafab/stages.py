"""A training in stages: which run is next, and the checkpoint that it begins with.

    <run.dir>/
        stages.json            the stages in order, each with its parent
        NAME/                  a run like any other (config.yaml, metrics.jsonl, checkpoints/)
        NAME/start.json        what it begins with: the parent's last checkpoint, the operation, what is kept
        NAME/start/            that checkpoint after the operation, where there is one
        NAME/finished.json     its run has come to its end

The same command again does what is left: a finished stage is passed over, a broken one resumes, an operation
that was cut short is made again (it becomes visible by one rename).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megafab.checkpoint.changes import changes, shown
from megafab.config.load import from_yaml
from megafab.config.schema import RunConfig
from megafab.config.stages import START, Stage, named
from megafab.config.tree import to_tree
from megafab.errors import UserError
from megafab.run import Progress
from megafab.telemetry.rows import CONFIG_FILE, STAGES_FILE, replace_text

FINISHED, ORIGIN = "finished.json", "start.json"
# A finished stage may have other values here: they change nothing of what it has computed.
_HARMLESS = (
    *("train.log_every", "train.micro_batch", "train.recompute", "train.head_chunk", "train.max_skipped"),
    *("kernels", "data.path"),
)
_HARMLESS_SECTIONS = ("eval", "engine", "resilience")

# Makes the checkpoint in the second directory of that in the first, as the stage's operation says.
Operate = Callable[[Stage, Path, Path], None]


def run(
    stages: Sequence[Stage],
    train: Callable[[Stage], int],
    leave: Callable[[], bool],
    message: Callable[[str], None],
) -> int:
    """Run what is left of the stages, one after the other.

    Args:
        stages: all, in order; the rules have passed.
        train: prepares a stage and runs it to its end, or until a signal; returns the exit code of its ranks.
        leave: whether a signal has asked to, which may come too late for a stage to notice.
        message: shows one line to the user.

    Returns:
        0, or the exit code of the stage that failed. 0 too where a signal asked to leave.

    Raises:
        UserError: a finished stage has other settings now.
    """
    for number, stage in enumerate(stages, 1):
        title = f"stage {stage.name} ({number} of {len(stages)})"
        if is_done(stage, stages):
            message(f"{title}: finished")
            continue
        message(f"{title}: {_described(stage)}")
        code = train(stage)
        if code != 0:
            return code
        if not _finished(stage.config):
            message(f"{title}: not finished; the same command goes on")
            return 0
        if leave() and stage is not stages[-1]:
            message(f"{title}: finished; the same command goes on with the next")
            return 0
    return 0


def is_done(stage: Stage, stages: Sequence[Stage]) -> bool:
    """Whether a stage has nothing left to do: it is finished, with the settings that it has now.

    Raises:
        UserError: its settings are others, and stages were built on it, or there is no step left for them.
    """
    if not _finished(stage.config):
        return False
    then, now = to_tree(from_yaml(Path(stage.config.run.dir) / CONFIG_FILE)), to_tree(stage.config)
    changed = [change for change in changes(then, now) if not _harmless(change[0])]
    if not changed:
        _require_same_origin(stage)
        return True
    told = ", ".join(f"{key} from {shown(old)} to {shown(new)}" for key, old, new in changed)
    found = f"other settings than it was finished with: {told}"
    children = [s.name for s in stages if s.parent == stage.name and _origin(s) is not None]
    if children:
        expected = f"the same ones, since stage {children[0]} was begun with its checkpoint"
        fix = "undo the change, or give run.dir another place"
        raise UserError(f"stages.{stage.name}", found, expected, fix)
    lengths = (change for change in changed if change[0] in ("train.steps", "train.tokens"))
    if not any(old and new and new > old for _, old, new in lengths):
        expected, fix = "the same ones, or more steps to train with others", "undo it, or raise train.steps"
        raise UserError(f"stages.{stage.name}", found, expected, fix)
    return False


def prepare(stage: Stage, stages: Sequence[Stage], operate: Operate) -> None:
    """Make what a stage begins with, where it has no checkpoints of its own yet. On one process.

    Raises:
        UserError: the parent is not finished, its checkpoint is damaged, the operation is refused, or the
            stage was begun with something else.
    """
    directory = Path(stage.config.run.dir)
    root = directory.parent
    listed = {one.name: {"parent": one.parent} for one in stages}
    replace_text(root / STAGES_FILE, json.dumps(listed, indent=1) + "\n")
    if stage.parent is None:
        return
    if (directory / "checkpoints").exists():
        _require_same_origin(stage)
        return
    parent = named(stages, stage.parent)
    if not _finished(parent.config):
        raise UserError(
            f"stage={stage.name}",
            f"no finished stage {parent.name}, with whose last checkpoint it begins",
            f"{Path(parent.config.run.dir) / FINISHED}",
            f"run that one first: stage={parent.name}",
        )
    source = _last_checkpoint(parent)
    wanted = {**_kept(stage), "source": _seal(source)}
    made = directory / START
    if _origin(stage) != wanted:
        shutil.rmtree(made, ignore_errors=True)
        (directory / ORIGIN).unlink(missing_ok=True)
    for leftover in directory.glob(f".{START}.tmp-*"):  # of an operation that was killed
        shutil.rmtree(leftover)
    if stage.operation.is_any and not made.exists():
        operate(stage, source, made)
    replace_text(directory / ORIGIN, json.dumps(wanted, indent=1) + "\n")


def is_prepared(stage: Stage) -> bool:
    """Whether a stage can be begun, by ranks that did not prepare it."""
    begun = (Path(stage.config.run.dir) / "checkpoints").exists()
    return begun or stage.parent is None or _origin(stage) is not None


def started(stage: Stage, stages: Sequence[Stage]) -> RunConfig:
    """The configuration of a prepared stage's run, which begins with its parent's last checkpoint or none."""
    if stage.parent is None or stage.operation.is_any:
        return stage.config
    parent = named(stages, stage.parent)
    if not _finished(parent.config):  # gone, while the stage has checkpoints of its own
        return stage.config
    return replace(stage.config, start=replace(stage.config.start, checkpoint=str(_last_checkpoint(parent))))


def begin(config: RunConfig) -> None:
    """Note that a run goes on, or begins: it is not finished, whatever was said of a shorter one."""
    (Path(config.run.dir) / FINISHED).unlink(missing_ok=True)


def finish(config: RunConfig, progress: Progress) -> None:
    """Note that a run has come to its end."""
    replace_text(Path(config.run.dir) / FINISHED, json.dumps(asdict(progress), indent=1) + "\n")


def _finished(config: RunConfig) -> bool:
    return (Path(config.run.dir) / FINISHED).exists()


def _harmless(key: str) -> bool:
    return key in _HARMLESS or key.partition(".")[0] in _HARMLESS_SECTIONS


def _described(stage: Stage) -> str:
    if stage.parent is None:
        return "begins with random weights" if stage.config.start.checkpoint is None else "begins"
    done = ", grown" if stage.operation.grow is not None else ", densified" if stage.operation.densify else ""
    return f"begins with the last checkpoint of stage {stage.parent}{done}"


def _kept(stage: Stage) -> dict[str, Any]:
    """What a stage says of what it begins with."""
    start = stage.config.start
    return {
        "parent": stage.parent,
        "grow": to_tree(stage.operation.grow),
        "densify": stage.operation.densify,
        "optimizer": start.optimizer.value,
        "data": start.data.value,
    }


def _origin(stage: Stage) -> dict[str, Any] | None:
    path = Path(stage.config.run.dir) / ORIGIN
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _require_same_origin(stage: Stage) -> None:
    """What a stage was begun with is what it says now; it cannot be begun twice.

    Raises:
        UserError: it is not.
    """
    origin, now = _origin(stage), _kept(stage)
    if origin is None:
        return
    changed = [
        f"{key} from {shown(origin[key])} to {shown(now[key])}" for key in now if origin[key] != now[key]
    ]
    if changed:
        raise UserError(
            f"stages.{stage.name}",
            f"another beginning than it had: {', '.join(changed)}",
            "the same one: it has been trained from there",
            "undo the change, or give run.dir another place",
        )


def _last_checkpoint(stage: Stage) -> Path:
    """That of a finished stage's last step; its files are hashed by whoever reads it."""
    from megafab.checkpoint import store

    run_dir = Path(stage.config.run.dir)
    step = json.loads((run_dir / FINISHED).read_text(encoding="utf-8"))["step"]
    return store.path_of(run_dir / "checkpoints", step)


def _seal(checkpoint: Path) -> str:
    """What identifies a checkpoint, wherever it lies."""
    from megafab.checkpoint import store

    return store.read_manifest(checkpoint)["seal"]
