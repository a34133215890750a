"""What `megafab submit` is told beside the configuration of the run: the cluster's profile and the job."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from megafab.errors import ConfigError, ConfigErrors
from megafab.topology.config import LaunchConfig

MARGIN = 60.0  # seconds; Slurm may send a warning up to a minute early, never late
UNMEASURED = 300  # seconds before the time limit to be warned at, while nobody knows how long a save takes


class Launcher(Enum):
    """What starts the ranks."""

    srun = "srun"  # one task a rank: signals reach every rank
    torchrun = "torchrun"  # one agent a node, whose exit code tells nothing


class Continuation(Enum):
    """How a job that has to leave goes on."""

    requeue = "requeue"  # the same job, back in the queue
    new_job = "new_job"  # another one, where a site forbids requeues
    none = "none"  # not at all: the same megafab submit goes on


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """A profile of `conf/cluster/`: how jobs are asked for there, and what they need around them."""

    partition: str | None = None
    qos: str | None = None
    account: str | None = None
    needs_account: bool = False  # jobs without one are refused there
    constraint: str | None = None
    ranks_per_node: int = 1  # devices of a node: GPUs, or dies of them that count as GPUs
    gpus: str | None = None  # how to ask for the {ranks} devices of a node; null: no devices
    cpus_per_rank: int | None = None  # null: what the site gives
    memory: str | None = None  # of a node, such as 480G; null: what the site gives
    exclusive: bool = False  # nobody else on the nodes
    directives: list[str] = field(default_factory=list[str])  # further options of sbatch
    srun: list[str] = field(default_factory=list[str])  # further options of srun, such as those that bind
    modules: list[str] = field(default_factory=list[str])  # module load ...
    setup: list[str] = field(default_factory=list[str])  # lines of shell before the ranks start
    env: dict[str, str] = field(default_factory=dict[str, str])  # network settings and the like
    container: str | None = None  # a command in front of each rank's, such as apptainer exec --nv image.sif
    python: str | None = None  # on the nodes; null: the one that submits


@dataclass(frozen=True, slots=True)
class JobConfig:
    """The job: how long, how it is started, and how it survives."""

    time: str = "24:00:00"  # limit of one job: minutes, [DAYS-]HH:MM:SS; a run may take many
    launcher: Launcher = Launcher.srun
    continuation: Continuation = Continuation.requeue
    signal_seconds: int | None = None  # warning before the limit; null: from the run's saves so far
    max_failures: int = 3  # sessions in a row that fail without a further checkpoint: then it stops
    parts: int | None = None  # of a corpus, built by as many tasks of an array; null: one task builds it
    parallel: int | None = None  # tasks of an array at a time; null: as many as there is room for
    after: str | None = None  # a dependency of Slurm, such as afterok:1234


@dataclass(frozen=True, slots=True)
class SubmitConfig:
    """`conf/submit.yaml`."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    job: JobConfig = field(default_factory=JobConfig)


@dataclass(frozen=True, slots=True)
class Layout:
    """The nodes of a job and the ranks on each."""

    nodes: int
    ranks_per_node: int

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.nodes * self.ranks_per_node


_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}")


def check(config: SubmitConfig) -> None:
    """Refuse what no cluster could take, all at once.

    Raises:
        ConfigErrors: with one line for every mistake.
    """
    problems = list(_problems(config))
    if problems:
        raise ConfigErrors(problems)


def _problems(config: SubmitConfig) -> Iterator[ConfigError]:
    cluster, job = config.cluster, config.job
    if cluster.partition is None and cluster.qos is None:
        expected, fix = "where to queue", "cluster.partition=NAME; sinfo lists them"
        yield ConfigError("cluster.partition", "neither a partition nor a qos", expected, fix)
    if cluster.needs_account and cluster.account is None:
        yield ConfigError("cluster.account", "none", "the project to charge", "cluster.account=NAME")
    least = {
        "cluster.ranks_per_node": cluster.ranks_per_node,
        "cluster.cpus_per_rank": cluster.cpus_per_rank,
        "job.max_failures": job.max_failures,
        "job.signal_seconds": job.signal_seconds,
        "job.parallel": job.parallel,
        "job.parts": job.parts,
    }
    for key, value in least.items():
        if value is not None and value < 1:
            yield ConfigError(f"{key}={value}", str(value), "at least 1", f"{key}=1 or more")
    if not _TIME.fullmatch(job.time):
        expected = "minutes, MM:SS, HH:MM:SS or DAYS-HH[:MM[:SS]]"
        yield ConfigError(f"job.time={job.time}", "no time limit", expected, "job.time=24:00:00, for example")
    elif job.signal_seconds is not None and 0 < seconds_of(job.time) <= job.signal_seconds:
        where, expected = f"job.signal_seconds={job.signal_seconds}", f"less than job.time={job.time}"
        yield ConfigError(where, "a warning before the job has begun", expected, "lower it, or leave it out")
    alone = [option for option in cluster.srun if option.startswith(("--gpus-per-task", "--gpu-bind=single"))]
    if job.launcher is Launcher.torchrun and alone:
        found = f"cluster.srun=[{', '.join(alone)}], which shows one device to the one task of a node"
        fix = "job.launcher=srun, or cluster.srun without it"
        yield ConfigError("job.launcher=torchrun", found, "all devices of a node for it", fix)
    if cluster.gpus is not None and "{ranks}" not in cluster.gpus:
        expected, fix = "{ranks} in it, where the number goes", "cluster.gpus='--gpus-per-node={ranks}'"
        yield ConfigError(f"cluster.gpus={cluster.gpus}", "no number", expected, fix)
    for key, lines in (("cluster.directives", cluster.directives), ("cluster.srun", cluster.srun)):
        for line in lines:
            if not line.startswith("-"):
                expected, fix = "options, each beginning with -", f"{key}=[--option=value]"
                yield ConfigError(f"{key}=[{line}]", "no option", expected, fix)


def layout(launch: LaunchConfig, cluster: ClusterConfig) -> Layout:
    """Where the ranks of a run go: nodes filled one after the other, or `launch.nodes` of them alike.

    Raises:
        ConfigError: they do not fit, or not evenly.
    """
    ranks, full = launch.ranks, cluster.ranks_per_node
    for key, value in (("launch.ranks", ranks), ("launch.nodes", launch.nodes)):
        if value is not None and value < 1:
            raise ConfigError(f"{key}={value}", str(value), "at least 1", f"{key}=1 or more")
    nodes = launch.nodes or -(-ranks // full)
    where = f"launch.ranks={ranks}" + (f", launch.nodes={nodes}" if launch.nodes else "")
    if ranks % nodes:
        expected, fix = "as many on each node", f"launch.ranks={-(-ranks // nodes) * nodes}, or other nodes"
        raise ConfigError(where, f"{ranks} ranks on {nodes} nodes", expected, fix)
    if ranks // nodes > full:
        found, fix = f"{ranks // nodes} ranks on a node", f"launch.nodes={-(-ranks // full)}"
        raise ConfigError(where, found, f"at most cluster.ranks_per_node={full}", fix)
    return Layout(nodes, ranks // nodes)


def warning_seconds(job: JobConfig, longest_save: float | None) -> int:
    """Seconds before the time limit at which the job is warned: room for a save, for a step and to leave."""
    if job.signal_seconds is not None:
        return job.signal_seconds
    return UNMEASURED if longest_save is None else int(MARGIN + 2 * longest_save + 0.5)


def seconds_of(time: str) -> int:
    """A time limit as Slurm writes it, in seconds: minutes, MM:SS, HH:MM:SS, DAYS-HH, DAYS-HH:MM[:SS]."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
