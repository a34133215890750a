"""Jobs as files: what a configuration makes of `slurm/job.sh.j2`, and where it is put."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafab.config.load import config_directory
from megafab.config.submit import ClusterConfig, Launcher, Layout, SubmitConfig, seconds_of, warning_seconds
from megafab.errors import ConfigError
from megafab.telemetry.rows import replace_text
from megafab.telemetry.sessions import longest_save

TEMPLATE = "job.sh.j2"
# A rank that fails ends the others, one that has left well does not; lines of the log begin with their rank.
_SRUN = ("--kill-on-bad-exit=1", "--wait=0", "--label", "--export=ALL")


@dataclass(frozen=True, slots=True)
class Kind:
    """What a job script must know of a command, in bash: $run is the directory of the task.

    `finished` tests whether a command that ended well has nothing left to do; `newest` prints something that
    changes when a session has come to a further `result`.
    """

    finished: str
    newest: str
    result: str


TRAINING = Kind('[[ -f "$run/finished.json" ]]', 'cat "$run/checkpoints/latest" 2> /dev/null', "checkpoint")


@dataclass(frozen=True, slots=True)
class Task:
    """One command of a job; an array has several. `directory` is where its state and its log are."""

    directory: Path
    overrides: tuple[str, ...] = ()  # beside those that all tasks have


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be submitted.

    `verb` is megafab's, `overrides` what it is told; `tasks` are one, or the tasks of an array, whose files
    are in `directory`. `kind` says what the commands are like; of the directory `report` there is a report in
    the end (None: no report). `cpus` of a task count more than the profile's.
    """

    name: str
    verb: str
    overrides: tuple[str, ...]
    tasks: tuple[Task, ...]
    directory: Path
    layout: Layout
    kind: Kind
    report: Path | None = None
    cpus: int | None = None

    @property
    def script(self) -> Path:
        """The file that is submitted."""
        return self.directory / "slurm" / "job.sh"

    @property
    def log(self) -> str:
        """Where Slurm writes what the job prints, as Slurm's pattern."""
        place = str(self.directory / "slurm").replace("%", "%%")
        return f"{place}/{'%A_%a' if len(self.tasks) > 1 else '%j'}.log"

    def log_of(self, number: str) -> Path:
        """The log of the job with that number; of an array, the pattern of its tasks' logs."""
        name = f"{number}_%a.log" if len(self.tasks) > 1 else f"{number}.log"
        return self.directory / "slurm" / name


def render(job: Job, config: SubmitConfig) -> str:
    """The script of a job."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    cluster, layout = config.cluster, job.layout
    lead = _lead(job, config)
    python = cluster.python or sys.executable
    torchrun = config.job.launcher is Launcher.torchrun
    words = ["-m", "launch.cli", *job.verb.split(), *job.overrides]
    environment = Environment(
        loader=FileSystemLoader(template_directory()),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quoted"] = shlex.quote
    return environment.get_template(TEMPLATE).render(
        title=f"{job.name}: megafab {job.verb} on {layout.nodes} x {layout.ranks_per_node} ranks",
        script=shlex.quote(str(job.script)),
        options=[_quoted(option) for option in _options(job, config, lead)],
        name=shlex.quote(job.name),
        logs=shlex.quote(str(job.directory / "slurm")),
        command=[shlex.quote(word) for word in (words if torchrun else [python, *words])],
        tasks=[
            {"directory": shlex.quote(str(task.directory)), "overrides": map(shlex.quote, task.overrides)}
            for task in job.tasks
        ],
        modules=cluster.modules,
        env={name: shlex.quote(value) for name, value in _environment(cluster).items()},
        setup=cluster.setup,
        ranks=layout.ranks,
        nodes=layout.nodes,
        ranks_per_node=layout.ranks_per_node,
        lead=lead,
        continuation=config.job.continuation.value,
        max_failures=config.job.max_failures,
        launcher=config.job.launcher.value,
        srun=[*_SRUN, *_cpus(job, config), *(cluster.srun if job.kind is TRAINING else ())],
        container=f"{cluster.container} " if cluster.container else "",
        python=shlex.quote(python),
        finished=job.kind.finished,
        newest=job.kind.newest,
        result=job.kind.result,
        report="" if job.report is None else '"$run"' if len(job.tasks) > 1 else shlex.quote(str(job.report)),
    )


def write(job: Job, text: str) -> None:
    """Put the script, and a directory for logs, where the job expects them."""
    job.script.parent.mkdir(parents=True, exist_ok=True)
    for task in job.tasks:
        (task.directory / "slurm").mkdir(parents=True, exist_ok=True)
    replace_text(job.script, text)


def template_directory() -> Path:
    """`slurm/` of the source checkout, or its copy inside the installed package."""
    return config_directory().parent / "slurm"


def _quoted(option: str) -> str:
    """An option as a line after #SBATCH takes it, where # begins a comment; quotes are refused before."""
    return option if re.fullmatch(r"[\w@:.,/=+%*-]+", option) else f"'{option}'"


def check_names(**names: str) -> None:
    """Refuse names and paths that no line of a job script can hold.

    Raises:
        ConfigError: a quote, a backslash or a control character.
    """
    for key, name in names.items():
        bad = next((one for one in name if one in "'\"\\" or not one.isprintable()), None)
        if bad is not None:
            where, expected = (
                f"{key.replace('_', '.')}={name!r}",
                "no quotes, backslashes or control characters",
            )
            raise ConfigError(where, repr(bad), expected, "another name")


def _environment(cluster: ClusterConfig) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(cluster.cpus_per_rank or 1), **cluster.env}


def _options(job: Job, config: SubmitConfig, lead: int) -> list[str]:
    """The lines after #SBATCH."""
    cluster, limits, layout = config.cluster, config.job, job.layout
    per_node = 1 if limits.launcher is Launcher.torchrun else layout.ranks_per_node
    requeues = limits.continuation.value == "requeue"
    given: Mapping[str, Any] = {
        "job-name": job.name,
        "partition": cluster.partition,
        "qos": cluster.qos,
        "account": cluster.account,
        "constraint": cluster.constraint,
        "nodes": layout.nodes,
        "ntasks-per-node": per_node,
        "mem": cluster.memory,
        "time": limits.time,
        "signal": f"B:USR1@{lead}",
        "open-mode": "append",
        "chdir": Path.cwd(),
        "output": job.log,
    }
    options = [f"--{key}={value}" for key, value in given.items() if value is not None]
    options += _cpus(job, config)
    if cluster.gpus is not None and job.kind is TRAINING:
        options.append(cluster.gpus.format(ranks=layout.ranks_per_node))
    if cluster.exclusive:
        options.append("--exclusive")
    options.append("--requeue" if requeues else "--no-requeue")
    if len(job.tasks) > 1:
        at_a_time = f"%{limits.parallel}" if limits.parallel else ""
        options.append(f"--array=0-{len(job.tasks) - 1}{at_a_time}")
    return [*options, *cluster.directives]


def _cpus(job: Job, config: SubmitConfig) -> Sequence[str]:
    """Cores of a task; said to srun too, which does not take them from the job."""
    cpus = job.cpus or config.cluster.cpus_per_rank
    if cpus is None:
        return []
    ranks = job.layout.ranks_per_node if config.job.launcher is Launcher.torchrun else 1
    return [f"--cpus-per-task={cpus * ranks}"]


def _lead(job: Job, config: SubmitConfig) -> int:
    """Seconds before the time limit at which Slurm warns; never so early that little is left of a job."""
    measured = [seconds for task in job.tasks if (seconds := longest_save(task.directory)) is not None]
    wanted, limit = warning_seconds(config.job, max(measured, default=None)), seconds_of(config.job.time)
    return wanted if config.job.signal_seconds or not limit else max(1, min(wanted, limit // 3))
