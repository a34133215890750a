"""The composition root: a checked configuration becomes the parts of a run. It alone imports every package.

The order is fixed by what depends on what: corpus and mesh are plain facts, groups join the job, the plan
is what techniques may still edit, then the modules, the engine around them, and what the loop uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megafab import retrieval
from megafab.checkpoint.identity import identity
from megafab.checkpoint.state import Checkpoints
from megafab.config import tree
from megafab.config.schema import Precision, RunConfig, TrainConfig
from megafab.data import mixture
from megafab.data.format import Corpus
from megafab.data.loader import Loader, validation_batches
from megafab.data.plan import DataPlan
from megafab.data.skips import Skips
from megafab.engine.base import Engine
from megafab.engine.capabilities import mode_of
from megafab.engine.config import EngineName
from megafab.engine.megatron import MegatronEngine
from megafab.engine.sharded import Memory
from megafab.errors import ConfigError
from megafab.kernels import dispatch
from megafab.loss.ledger import LossLedger
from megafab.model import plan as model_plan
from megafab.model.shape import ModelShape
from megafab.optim import schedule_text
from megafab.optim.config import WHOLE_MATRICES, OptimConfig, ScheduleConfig
from megafab.optim.schedules import Schedules, rates
from megafab.platform import platform
from megafab.resilience.invariants import Invariants
from megafab.resilience.signals import Received, Signals, TimeLimit
from megafab.resilience.spikes import SPIKES_FILE, Spikes
from megafab.resilience.stragglers import Stragglers
from megafab.resilience.watchdog import Watchdog
from megafab.run import Batch, Cadence, Progress, Run, StepOutcome, StepPlan, Validation, Verdict
from megafab.techniques import catalogue
from megafab.techniques.base import Clock, Facts, RunPlan
from megafab.techniques.bus import Bus
from megafab.telemetry.metrics import build_telemetry, peak_flops
from megafab.topology import groups as topology
from megafab.topology.groups import Groups
from megafab.topology.mesh import Mesh

if TYPE_CHECKING:
    from megafab.engine.deepspeed import DeepSpeedEngine

_EVALUATED_TOGETHER = 8  # micro-batches of an evaluation for each pipeline stage: at most an eighth is bubble
_DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


def build(
    config: RunConfig,
    *,
    ranks: int,
    received: Received | None = None,
    limit: TimeLimit | None = None,
    message: Callable[[str], None] = print,
) -> Run:
    """Make the run of this rank. The platform has been started, the rules have passed.

    Args:
        config: the whole configuration.
        ranks: the size of the job.
        received: the signals that this rank was sent; None: none can come.
        limit: the job's time limit, if it has one.
        message: shows one line to the user before telemetry exists; rank 0 only.

    Raises:
        UserError: what only the data or the techniques can tell to be wrong.
    """
    corpus = Corpus.open(config.data.path)
    shape = ModelShape.of(config.model, corpus.vocab_size)
    mesh = Mesh.of(config.parallel, ranks)
    groups = topology.initialize(mesh, seed=config.train.seed, timeout_minutes=config.launch.timeout_minutes)
    message = message if groups.rank == 0 else _silent
    kernels = dispatch.set_up(config.kernels, message)
    window = retrieval.window(config)
    weights = mixture.weights(config.data.mixture, corpus, config.data.temperature)
    schedules = Schedules(
        config.train,
        config.optim,
        config.schedule,
        seq_len=config.model.seq_len,
        domain_weights=weights,
        data_ranks=mesh.data,
        flops_per_token=shape.flops_per_token(),
    )
    kind = _engine_class(config.engine.name)
    bus = Bus(
        catalogue.build(
            config.techniques,
            _facts(config, shape, corpus, weights, schedules.total_steps, lambda: _plans(schedules, bus)),
        ),
        seed=config.train.seed,
        data_rank=mesh.data_rank(groups.rank),
        capabilities=kind.capabilities,
        agree_max=groups.agree_max,
        message=message,
    )
    data = DataPlan(corpus, retrieval=retrieval.of(config, corpus))
    clock = Clock()
    engine = _engine(kind, config, shape, groups, bus, data, clock)
    loader = Loader(
        corpus,
        split="train",
        seed=config.train.seed,
        seq_len=window,
        packing=config.data.packing,
        data_rank=mesh.data_rank(groups.rank),
        data_ranks=mesh.data,
        prefetch=config.data.prefetch,
        plan=data,
        block=config.data.block,
        max_epochs=config.data.max_epochs,
        skips=Skips.of(config.data.skip),
    )
    plain = tree.to_tree(config)
    peak = peak_flops(platform.device_name())
    telemetry = build_telemetry(
        config.run,
        config.tracking,
        config=plain,
        header=_header(config, shape, mesh, data, weights, engine.memory(), schedules.describe(), kernels),
        preface=list(schedule_text.lines(schedules)),
        ranks=ranks,
        is_writer=groups.rank == 0,
        log_every=config.train.log_every,
        peak_flops=peak * ranks if peak else None,
        total_steps=schedules.total_steps,
        synchronize=platform.synchronize,
    )
    signals = Signals(groups.agree_max, received or Received(), limit=limit)
    validation = _validation(config, data, groups)

    def saved(step: int, seconds: float) -> None:
        signals.saved(seconds)
        telemetry.saved(step, seconds)

    spikes = Spikes(
        config.resilience.spikes,
        loader=loader,
        domains=corpus.domains,
        file=Path(config.run.dir) / SPIKES_FILE if groups.rank == 0 else None,
        message=telemetry.message,
    )
    return Run(
        engine=engine,
        loader=loader,
        schedules=schedules,
        bus=bus,
        telemetry=telemetry,
        checkpoints=Checkpoints(
            config=config.checkpoint,
            start=config.start,
            run_dir=Path(config.run.dir),
            engine=engine,
            loader=loader,
            techniques=bus,
            data=identity(
                data,
                weights=weights,
                packing=config.data.packing,
                seed=config.train.seed,
                seq_len=window,
                block=config.data.block,
            ),
            resolved=plain,
            topology=_axes(mesh),
            rates=lambda config, then, now: rates(schedules, _schedules_of(config), then, now),
            message=telemetry.message,
            saved=saved,
            spikes=spikes,
            group=groups.host,
        ),
        validation=validation,
        invariants=Invariants(engine, groups, config.resilience.check_every),
        signals=signals,
        spikes=spikes,
        watchdog=Watchdog(
            config.resilience.stall_seconds,
            groups=groups,
            timers=telemetry.timers,
            clock=clock,
            run_dir=Path(config.run.dir),
            message=telemetry.message,
        ),
        stragglers=Stragglers(
            config.resilience.straggler_every,
            config.resilience.straggler_ratio,
            groups=groups,
            timers=telemetry.timers,
            message=telemetry.message,
        ),
        cadence=Cadence(
            eval_every=config.eval.every,
            evaluate=bool(validation.batches),
            save_every=config.checkpoint.every,
            save_last=config.checkpoint.save_last,
            max_skipped=config.train.max_skipped,
        ),
    )


def _schedules_of(config: Mapping[str, Any]) -> Schedules | None:
    """Those of the run whose configuration is in a checkpoint; None where weights come from elsewhere, or
    another version of megafab wrote it."""
    try:
        return Schedules(
            tree.build(TrainConfig, config["train"]),
            tree.build(OptimConfig, config["optim"]),
            tree.build(ScheduleConfig, config["schedule"]),
            seq_len=config["model"]["seq_len"],
            domain_weights=(1.0,),
            data_ranks=1,
        )
    except (ConfigError, KeyError):
        return None


def _facts(
    config: RunConfig,
    shape: ModelShape,
    corpus: Corpus,
    weights: tuple[float, ...],
    steps: int,
    plans: Callable[[], Iterator[StepPlan]],
) -> Facts:
    return Facts(
        seed=config.train.seed,
        shape=shape,
        domains=corpus.domains,
        weights=weights,
        tokens=corpus.tokens("train"),
        text_bytes=corpus.text_bytes("train"),
        steps=steps,
        fixed=() if config.techniques.replay is None else tuple(config.techniques.replay.domains),
        whole_matrices=config.optim.name in WHOLE_MATRICES,
        plans=plans,
    )


def _plans(schedules: Schedules, bus: Bus) -> Iterator[StepPlan]:
    """The plans of the run from its first step on, if every update is applied."""
    progress, applied = Progress(), StepOutcome(True, Verdict(), 0.0)
    while schedules.remaining(progress):
        plan = bus.schedule(schedules.at(progress), progress)
        yield plan
        progress = progress.advance(plan, applied)


def _engine_class(name: EngineName) -> type[MegatronEngine] | type[DeepSpeedEngine]:
    if name is EngineName.megatron:
        return MegatronEngine
    from megafab.engine.deepspeed import DeepSpeedEngine  # importing deepspeed takes a second

    return DeepSpeedEngine


def _engine(
    kind: type[MegatronEngine] | type[DeepSpeedEngine],
    config: RunConfig,
    shape: ModelShape,
    groups: Groups,
    bus: Bus,
    data: DataPlan,
    clock: Clock,
) -> Engine:
    plan = model_plan.plan(
        shape,
        groups,
        precision=_DTYPES[config.train.precision],
        recompute=config.train.recompute.value,
        sequence_parallel=config.parallel.sequence,
        context_method=config.parallel.context_method,
    )
    bus.plan(RunPlan(plan, data), groups.mesh)
    chunks = model_plan.build(plan, groups, config.train.seed)
    bus.build(chunks, clock)
    return kind(
        plan,
        chunks,
        groups,
        engine=config.engine,
        optim=config.optim,
        context_method=config.parallel.context_method,
        clock=clock,
        ledger=lambda: LossLedger(
            data.corpus.domains,
            (*bus.terms, *bus.notes),
            device=platform.device,
            sum_ranks=groups.sum_over_job,
        ),
        head_chunk=config.train.head_chunk,
        plain_loss=bus.plain_loss,
    )


def _validation(config: RunConfig, data: DataPlan, groups: Groups) -> Validation:
    """All domains' sequences, in parts between which a signal is heard.

    A part is of several domains, and long enough for a pipeline to be full most of the time.
    """
    micro = config.train.micro_batch
    by_domain = validation_batches(
        data.corpus,
        samples_per_domain=config.eval.samples,
        seq_len=retrieval.window(config),
        packing=config.data.packing,
        data_rank=groups.mesh.data_rank(groups.rank),
        data_ranks=groups.mesh.data,
        micro_batch=micro,
        retrieval=data.retrieval,
    )
    batches = [batch for batches in by_domain.values() for batch in batches]
    if not batches:
        return Validation((), micro)
    # The interleaved schedule takes whole rounds of the pipeline; the filling counts for nothing.
    missing = -len(batches) % groups.mesh.pipeline if groups.mesh.virtual_pipeline > 1 else 0
    batches += [batches[-1].without_labels()] * missing
    part = _EVALUATED_TOGETHER * groups.mesh.pipeline
    parts = (batches[start : start + part] for start in range(0, len(batches), part))
    return Validation(tuple(Batch.concatenate(batches) for batches in parts), micro)


def _header(
    config: RunConfig,
    shape: ModelShape,
    mesh: Mesh,
    plan: DataPlan,
    weights: tuple[float, ...],
    memory: Memory,
    schedule: str,
    kernels: str,
) -> Mapping[str, str]:
    """What the reader of the terminal and the log wants to know first."""
    tokens, names = plan.corpus.tokens("train"), plan.corpus.domains
    domains = ", ".join(f"{name} {weight:.0%}" for name, weight in zip(names, weights, strict=True))
    again = shape.flops_per_token(
        recompute=config.train.recompute.value, head_again=config.train.head_chunk is not None
    )
    more = {} if plan.retrieval is None else {"retrieval": plan.retrieval.describe(shape.retro_layers)}
    return {
        "model": f"{config.model.name}: {shape.parameters:,} parameters, {config.model.layers} layers, "
        f"hidden {config.model.hidden}, sequence {config.model.seq_len}, vocabulary {shape.vocab:,}",
        "topology": f"{mesh.ranks} ranks on {platform.device.type}: {mesh.describe()}",
        "engine": f"{_mode(config)}, {config.optim.name.value}, {config.train.precision.value}",
        "rank 0": f"{memory.parameters / 1e6:,.1f} MB of parameters, {memory.optimizer / 1e6:,.1f} MB of "
        "optimizer state",
        "FLOPs": f"{shape.flops_per_token():.3g} a token, {again:.3g} with recomputation",
        "kernels": kernels,
        "schedule": schedule,
        "data": f"{config.data.path}: {sum(tokens):,} training tokens; {domains}",
        **more,
        "run": config.run.dir,
    }


def _mode(config: RunConfig) -> str:
    engine = config.engine
    mode = mode_of(engine.name, engine.zero_stage, engine.offload)
    assert mode is not None, "the rules have passed"
    return mode.name if engine.name is EngineName.megatron else f"deepspeed {mode.name}"


def _axes(mesh: Mesh) -> dict[str, int]:
    return {
        "ranks": mesh.ranks,
        "tensor": mesh.tensor,
        "context": mesh.context,
        "data": mesh.data,
        "pipeline": mesh.pipeline,
        "virtual_pipeline": mesh.virtual_pipeline,
        "expert": mesh.expert,
    }


def _silent(text: str) -> None:
    """What the other ranks have to say is the same."""
