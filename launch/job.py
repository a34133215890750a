"""What a job script (`slurm/job.sh.j2`) tells the commands that it runs, and they tell it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from megafab.resilience.signals import TimeLimit

ENDS = "MEGAFAB_JOB_ENDS"  # when the job is killed, in seconds since 1970
LEAD = "MEGAFAB_JOB_LEAD"  # seconds before that to leave at, until a save was measured
REFUSAL = "MEGAFAB_JOB_REFUSAL"  # the file for a line that a person must act on: the job is not to go on


def time_limit(env: Mapping[str, str] = os.environ) -> TimeLimit | None:
    """The time limit of the job that this process is in; None where no job script told of one."""
    ends, lead = env.get(ENDS), env.get(LEAD)
    return TimeLimit(float(ends), float(lead)) if ends and lead else None


def refuse(line: str, env: Mapping[str, str] = os.environ) -> None:
    """Tell the job script, if there is one, why there is no use in beginning again."""
    if REFUSAL in env:
        Path(env[REFUSAL]).write_text(line + "\n", encoding="utf-8")
