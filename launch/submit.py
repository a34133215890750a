"""`megafab submit`: a training run, its stages or a sweep, as Slurm jobs that are checked before they queue.

What is told beside `cluster` and `job` is for `megafab train`. The configuration is checked here, where a
mistake costs a second and not a wait; Slurm is asked whether it could ever start the job; then it is queued.
A staged run becomes a chain, each stage a job of its own size that waits for the one before it.

`megafab submit data` builds a corpus: an array that tokenizes its parts, and a job that puts it together.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import jobs, slurm
from launch.jobs import TRAINING, Job, Kind, Task
from launch.train import make_run_directory, split_stage
from megafab import stages as staged
from megafab.config import load, rules
from megafab.config import stages as declared
from megafab.config.schema import RunConfig
from megafab.config.stages import Stage
from megafab.config.submit import Continuation, Layout, SubmitConfig, check, layout
from megafab.errors import ConfigError, UserError
from megafab.telemetry.sessions import goodput

FLAGS = {
    "--dry-run": "show the script, and do nothing",
    "--test-only": "write it, and ask Slurm whether it could start, without queueing it",
    "--follow": "stay and show states and log until the job is over; Ctrl-C leaves the job alone",
    "--multirun": "a value with commas is a sweep: an array job with a run for each combination",
}
_OWN = ("cluster", "job")


def main(arguments: list[str]) -> int:
    """Submit what `arguments` say; returns the exit code, with --follow that of the job.

    Raises:
        UserError: the configuration, or Slurm, refuses it.
    """
    flags = [argument for argument in arguments if argument in FLAGS]
    config, overrides = _split([argument for argument in arguments if argument not in FLAGS])
    wanted = _wanted(overrides, config, sweeps="--multirun" in flags)
    if "--dry-run" in flags:
        for job in wanted:
            print(jobs.render(job, config), end="")
        return 0
    if "--follow" in flags and any(len(job.tasks) > 1 for job in wanted):
        fix = "leave it out; squeue shows the tasks, and each has a log"
        raise ConfigError("--follow", "an array of jobs", "one log to show", fix)
    slurm.require()
    for job in wanted:
        _prepare(job, config)
    if "--test-only" in flags:
        return 0
    numbers: list[str] = []
    for job in wanted:
        numbers.append(_submit(job, config, numbers[-1] if numbers else None))
    if "--follow" not in flags:
        return 0
    return _follow(wanted, numbers)


def own(overrides: Sequence[str]) -> list[str]:
    """The overrides that are about the cluster and the job."""
    return [text for text in overrides if text.lstrip("+~").partition("=")[0].partition(".")[0] in _OWN]


def _split(overrides: Sequence[str]) -> tuple[SubmitConfig, list[str]]:
    mine = own(overrides)
    config = load.compose(SubmitConfig, "submit", mine)
    check(config)
    return config, [text for text in overrides if text not in mine]


def _wanted(overrides: list[str], config: SubmitConfig, *, sweeps: bool) -> list[Job]:
    """The jobs, in the order in which they have to run."""
    if overrides[:1] == ["data"]:
        if sweeps:
            raise ConfigError("--multirun", "megafab submit data", "a training run", "leave it out")
        wanted = _corpus(overrides[1:], config)
    elif config.job.parts is not None:
        found, fix = "a training run", "leave it out, or megafab submit data ..."
        raise ConfigError(f"job.parts={config.job.parts}", found, "a corpus to build", fix)
    else:
        wanted = _sweep(overrides, config) if sweeps else _stages(overrides, config)
    several = len(wanted) > 1 or any(len(job.tasks) > 1 for job in wanted)
    if config.job.continuation is Continuation.new_job and several:
        found, fix = "several jobs, which wait for others by their numbers", "job.continuation=requeue"
        expected = "jobs that keep their numbers, or a single one (stage=NAME, part=K/N)"
        raise ConfigError("job.continuation=new_job", found, expected, fix)
    return wanted


def _stages(overrides: list[str], config: SubmitConfig) -> list[Job]:
    """One job, or one for each stage that is not finished."""
    name, rest = split_stage(overrides)
    stages = declared.of(rest)
    if name is None and not stages:
        return [_job(load.load(overrides), overrides, config)]
    wanted = stages if name is None else [declared.named(stages, name)]
    declared.check_all(stages)
    _require_parent(wanted, stages, config)
    left = [stage for stage in wanted if not staged.is_done(stage, stages)]
    if not left:
        raise UserError("megafab submit", "no stage left to train", "one", "raise train.steps of the last")
    root = Path(stages[0].config.run.dir).resolve().parent
    return [_job(stage.config, [*rest, f"stage={stage.name}"], config, root) for stage in left]


def _require_parent(wanted: Sequence[Stage], stages: Sequence[Stage], config: SubmitConfig) -> None:
    """A stage that is submitted alone begins with a checkpoint that is there, or that it waits for.

    Raises:
        ConfigError: it would be refused in the job.
    """
    if len(wanted) > 1 or wanted[0].parent is None or config.job.after is not None:
        return
    parent = declared.named(stages, wanted[0].parent)
    if not staged.is_done(parent, stages):
        where, found = f"stage={wanted[0].name}", f"no finished stage {parent.name}, with which it begins"
        fix = "submit all stages by leaving stage= out, or name a job that trains it: job.after=afterok:ID"
        raise ConfigError(where, found, "its last checkpoint", fix)


def _job(run: RunConfig, overrides: Sequence[str], config: SubmitConfig, report: Path | None = None) -> Job:
    place = _checked(run, config)
    directory = Path(run.run.dir).resolve()
    task = (Task(directory),)
    told = tuple(overrides)
    return Job(run.run.name, "train", told, task, directory, place, TRAINING, report or directory)


def _sweep(overrides: list[str], config: SubmitConfig) -> list[Job]:
    """An array with a run for each combination of values."""
    if declared.of([text for text in overrides if not load.is_sweep(text)]):
        expected, fix = "single runs", "submit each choice of its own"
        raise ConfigError("--multirun", "a recipe with stages", expected, fix)
    combinations = load.sweep(overrides)
    twice = next((one for one in combinations if combinations.count(one) > 1), None)
    if twice is not None:
        fix = "give each value once"
        raise ConfigError("--multirun", f"{','.join(twice)} twice", "runs that differ", fix)
    common = tuple(text for text in overrides if not load.is_sweep(text))
    base = load.load([*common, *combinations[0]])
    tasks: list[Task] = []
    places: dict[Layout, str] = {}
    for combination in combinations:
        label = ",".join(combination).replace("/", "_")
        directory = Path(base.run.dir).resolve() / label
        quoted = str(directory).replace('"', '\\"')
        group = [f"tracking.group={base.tracking.group or base.run.name}"]
        mine = (*combination, f'run.name="{base.run.name}-{label}"', f'run.dir="{quoted}"', *group)
        tasks.append(Task(directory, mine))
        places.setdefault(_checked(load.load([*common, *mine]), config), label)
    if len(places) > 1:
        found = "; ".join(f"{p.nodes} x {p.ranks_per_node} ranks with {label}" for p, label in places.items())
        fix = "sweep over launch.ranks in jobs of their own"
        raise ConfigError("--multirun", found, "tasks of one size, since an array has one", fix)
    directory, (place,) = Path(base.run.dir).resolve(), places
    return [Job(base.run.name, "train", common, tuple(tasks), directory, place, TRAINING, directory)]


def _corpus(overrides: list[str], config: SubmitConfig) -> list[Job]:
    """A job that builds a corpus, after an array of those that tokenize its parts."""
    from data_pipeline.build import is_built
    from data_pipeline.config import BuildConfig

    build = load.compose(BuildConfig, "data", overrides)
    jobs.check_names(out=build.out)
    if is_built(build):
        return []
    out, parts = Path(build.out).resolve(), config.job.parts or 1
    home = out.with_name(f"{out.name}.jobs")
    pieces = shlex.quote(str(out.with_name(f".{out.name}.building") / "pieces"))
    kind = Kind("true", f"find {pieces} -name '*.npz' 2> /dev/null | wc -l", "piece")
    told, size = tuple(overrides), Layout(1, 1)
    last = Job(out.name, "data", told, (Task(home),), home, size, kind, cpus=build.workers)
    if parts == 1:
        return [last]
    if build.part is not None:
        expected, fix = "all of it, for job.parts to divide", "leave part out"
        raise ConfigError(f"part={build.part}", "one part", expected, fix)
    tasks = tuple(Task(home / f"part_{n}", (f"part={n}/{parts}",)) for n in range(parts))
    array = home / "parts"
    return [Job(f"{out.name}-parts", "data", told, tasks, array, size, kind, cpus=build.workers), last]


def _checked(run: RunConfig, config: SubmitConfig) -> Layout:
    """Where a run's ranks go, once every rule has passed.

    Raises:
        ConfigError: a rule, or the cluster, refuses it.
    """
    place = layout(run.launch, config.cluster)
    jobs.check_names(run_name=run.run.name, run_dir=run.run.dir)
    rules.check_all(run, ranks=place.ranks, corpus=rules.corpus_facts(run))
    if run.checkpoint.resume == "none":
        expected, fix = "a run that goes on where it was, as a job that begins again must", "leave it out"
        raise ConfigError("checkpoint.resume=none", "a run that only begins", expected, fix)
    return place


def _prepare(job: Job, config: SubmitConfig) -> None:
    """Write the script and have bash and Slurm look at it.

    Raises:
        UserError: a job is at work there already, or either refuses the script.
    """
    for task in job.tasks:
        make_run_directory(task.directory)
        _require_no_job(task)
    jobs.write(job, jobs.render(job, config))
    syntax = subprocess.run(["bash", "-n", str(job.script)], capture_output=True, text=True, check=False)
    if syntax.returncode:
        found, expected = " ".join(syntax.stderr.split()), "lines that bash understands"
        raise UserError("cluster.setup, cluster.env", found, expected, f"see {job.script}")
    print(f"megafab: {job.script}: {slurm.try_out(job.script, _after(config, None))}", flush=True)


def _require_no_job(task: Task) -> None:
    file = task.directory / "slurm" / "job"
    number = file.read_text().strip() if file.exists() else ""
    now = slurm.state(number) if number else None
    if now is not None and not now.is_over:
        where, found = f"run.dir={task.directory}", f"job {number} ({now.name.lower()}) for it already"
        fix = f"wait for it, or scancel {number}, or give run.dir another place"
        raise UserError(where, found, "one job at a time", fix)


def _submit(job: Job, config: SubmitConfig, previous: str | None) -> str:
    """Queue a job, after the one before it if there is one; its number."""
    for task in job.tasks:
        for leftover in ("failures", "stopped"):  # of a job before: this one begins afresh
            (task.directory / "slurm" / leftover).unlink(missing_ok=True)
    number = slurm.submit(job.script, _after(config, previous))
    for task in job.tasks:
        (task.directory / "slurm" / "job").write_text(number + "\n")
    waits = f", after job {previous}" if previous else ""
    print(f"megafab: submitted job {number}{waits}: {job.name}; log: {job.log_of(number)}", flush=True)
    return number


def _after(config: SubmitConfig, previous: str | None) -> list[str]:
    if previous is not None:  # a stage that can never begin is cancelled rather than kept waiting
        return [f"--dependency=afterok:{previous}", "--kill-on-invalid-dep=yes"]
    return [f"--dependency={config.job.after}"] if config.job.after else []


def _follow(wanted: Sequence[Job], numbers: Sequence[str]) -> int:
    code = 0
    for job, number in zip(wanted, numbers, strict=True):
        directory = job.tasks[0].directory
        try:
            code = slurm.follow(number, job.log_of, directory / "slurm" / "job")
        except KeyboardInterrupt:
            print(f"megafab: job {number} goes on; its log: {job.log_of(number)}", file=sys.stderr)
            return os.EX_OK
        spent = goodput(directory)
        if spent is not None:
            print(f"megafab: {job.name}: {spent.describe()}")
        if code:
            break
    return code
