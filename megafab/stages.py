"""A training in stages: which run is next, and the checkpoint that it begins with.

    <run.dir>/
        stages.json            the stages in order, each with its parent
        NAME/                  a run like any other (config.yaml, metrics.jsonl, checkpoints/)
        NAME/start/            the parent's last checkpoint after the stage's operation, where it has one
        NAME/finished.json     its run has come to its end

The same command again does what is left: a finished stage is passed over, a broken one resumes, an operation
that was cut short is made again (it becomes visible by one rename).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from megafab.checkpoint.changes import changes, shown
from megafab.config.load import from_yaml
from megafab.config.schema import RunConfig
from megafab.config.stages import START, Stage
from megafab.config.tree import to_tree
from megafab.errors import UserError
from megafab.run import Progress
from megafab.telemetry.rows import CONFIG_FILE, STAGES_FILE, replace_text

FINISHED = "finished.json"


def run(
    stages: Sequence[Stage],
    root: Path,
    train: Callable[[Stage], int],
    leave: Callable[[], bool],
    message: Callable[[str], None],
) -> int:
    """Run what is left of the stages, one after the other.

    Args:
        stages: all, in order; the rules have passed.
        root: the directory of them all, which the caller has made and holds.
        train: runs a stage to its end, or until a signal, and returns the exit code of its ranks.
        leave: whether a signal has asked to, which may come too late for a stage to notice.
        message: shows one line to the user.

    Returns:
        0, or the exit code of the stage that failed. 0 too where a signal asked to leave.

    Raises:
        UserError: a finished stage has other settings now, and others were built on it.
    """
    listed = {stage.name: {"parent": stage.parent} for stage in stages}
    replace_text(root / STAGES_FILE, json.dumps(listed, indent=1) + "\n")
    for number, stage in enumerate(stages, 1):
        title = f"stage {stage.name} ({number} of {len(stages)})"
        if _is_done(stage, stages):
            message(f"{title}: finished")
            continue
        message(f"{title}: {_origin(stage)}")
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


def prepare(stage: Stage, stages: Sequence[Stage], message: Callable[[str], None]) -> None:
    """Make the checkpoint that a stage begins with, where an operation stands before it, unless it is there.

    Raises:
        UserError: the parent is not finished, its checkpoint is damaged, or the operation is refused.
    """
    if stage.parent is None:
        return
    parent = next(other for other in stages if other.name == stage.parent)
    if not _finished(parent.config):
        raise UserError(
            f"stage={stage.name}",
            f"no finished stage {parent.name}, with whose last checkpoint it begins",
            f"{Path(parent.config.run.dir) / FINISHED}",
            f"run that one first: stage={parent.name}",
        )
    if not stage.operation.is_any:
        return
    run_dir = Path(stage.config.run.dir)
    made = run_dir / START
    source = _last_checkpoint(parent)
    if made.exists():
        if _made_of(made, source):
            return
        if (run_dir / "checkpoints").exists():
            fix = f"give run.dir another place, or remove {run_dir}"
            raise UserError(str(made), f"not made of {source}", "what the stage began with", fix)
        shutil.rmtree(made)
    for leftover in run_dir.glob(f".{START}.tmp-*"):  # of an operation that was killed
        shutil.rmtree(leftover)
    if stage.operation.densify:
        from megafab.checkpoint.surgery.densify import densify

        densify(source, made)
    else:
        from megafab.checkpoint.surgery.grow import grow

        assert stage.operation.grow is not None
        grow(source, made, stage.operation.grow, message)


def begin(config: RunConfig) -> None:
    """Note that a run goes on, or begins: it is not finished, whatever was said of a shorter one."""
    (Path(config.run.dir) / FINISHED).unlink(missing_ok=True)


def finish(config: RunConfig, progress: Progress) -> None:
    """Note that a run has come to its end."""
    replace_text(Path(config.run.dir) / FINISHED, json.dumps(asdict(progress), indent=1) + "\n")


def _finished(config: RunConfig) -> bool:
    return (Path(config.run.dir) / FINISHED).exists()


def _is_done(stage: Stage, stages: Sequence[Stage]) -> bool:
    """Whether a stage has nothing left to do: it is finished, with the settings that it has now."""
    if not _finished(stage.config):
        return False
    then = from_yaml(Path(stage.config.run.dir) / CONFIG_FILE)
    changed = list(changes(to_tree(then), to_tree(stage.config)))
    children = [s.name for s in stages if s.parent == stage.name and Path(s.config.run.dir).exists()]
    if changed and children:
        told = ", ".join(f"{key} from {shown(old)} to {shown(new)}" for key, old, new in changed)
        raise UserError(
            f"stages.{stage.name}",
            f"other settings than it was finished with: {told}",
            f"the same ones, since stage {children[0]} was begun with its checkpoint",
            "undo the change, or give run.dir another place",
        )
    return not changed


def _origin(stage: Stage) -> str:
    if stage.parent is None:
        return "begins with random weights"
    done = ", grown" if stage.operation.grow is not None else ", densified" if stage.operation.densify else ""
    return f"begins with the last checkpoint of stage {stage.parent}{done}"


def _last_checkpoint(stage: Stage) -> Path:
    """The newest checkpoint of a finished stage; its files are hashed by whoever reads it."""
    from megafab.checkpoint import store

    return store.locate(Path(stage.config.run.dir), key=f"stages.{stage.name}")[0]


def _made_of(made: Path, source: Path) -> bool:
    """Whether the checkpoint in `made` was made of the one at `source` as that is now."""
    from megafab.checkpoint import store

    (path,) = store.locate(made, key="start")
    last, state = store.read_state(path)["lineage"][-1], store.read_state(source)
    return last["from"] == str(source.resolve()) and last["written_at"] == state["written_at"]
