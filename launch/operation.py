"""What a stage does to a checkpoint before it begins, in a process of its own: on the CPU, no rank of a job.

    python -m launch.operation FROM TO JSON

JSON is the stage's operation; exit codes are those of `megafab`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from megafab.config.stages import Operation, Stage
from megafab.config.tree import build, to_tree

# By these a process would take itself for one rank of a job.
_OF_A_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MEGAFAB_LAUNCHED")


def operate(stage: Stage, source: Path, made: Path) -> None:
    """Make the checkpoint in `made` of that in `source`.

    Raises:
        SystemExit: it failed, and has said why.
    """
    env = {k: v for k, v in os.environ.items() if k not in _OF_A_JOB and not k.startswith("SLURM_")}
    command = [sys.executable, "-m", "launch.operation", str(source), str(made)]
    done = subprocess.run(
        [*command, json.dumps(to_tree(stage.operation))], env={**env, "MEGAFAB_DEVICE": "cpu"}, check=False
    )
    if done.returncode:
        raise SystemExit(done.returncode)


def main(arguments: list[str]) -> int:
    """Run the operation; returns the exit code."""
    source, made = map(Path, arguments[:2])
    operation = build(Operation, json.loads(arguments[2]))
    if operation.densify:
        from megafab.checkpoint.surgery.densify import densify

        densify(source, made)
        return 0
    from megafab.checkpoint.surgery.grow import grow

    assert operation.grow is not None
    grow(source, made, operation.grow, lambda text: print(text, flush=True))
    return 0


if __name__ == "__main__":
    from launch.cli import guarded

    sys.exit(guarded(main, sys.argv[1:]))
