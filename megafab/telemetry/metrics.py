"""What a step becomes once it is done: one record, to every sink.

The loop holds one `Telemetry`. On ranks other than the writer it times and does nothing else, so that the
loop needs no test of its rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megafab.run import Action, Progress, StepOutcome, StepPlan, StepRecord
from megafab.telemetry.config import RunSection, TrackingConfig, TrackingKind
from megafab.telemetry.rows import chain_of
from megafab.telemetry.sessions import Session
from megafab.telemetry.sinks import JsonlSink, Sink, StagesSink, TensorBoardSink, WandbSink
from megafab.telemetry.terminal import Terminal
from megafab.telemetry.timers import Timers

PAUSES = ("evaluate", "checkpoint")  # parts that are no training: left out of throughput

# Dense bf16 FLOP/s by device name, from the vendors' data sheets; a longer name comes before its prefix.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "MI250X": 191.5e12,  # one of its two dies, which is what a rank sees
}


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of one device, without sparsity; None where it is not known (a CPU), and so is MFU."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


class Telemetry:
    """Times a run and records its steps.

    Args:
        sinks: where records go; the terminal among them.
        is_writer: whether this rank records.
        log_every: steps between records; the last step is always recorded.
        peak_flops: for MFU, of all devices of the job together; None when not known.
        total_steps: the length of the run as far as it is known; the loop says which step is the last.
        synchronize: waits for the device; called on steps that will be recorded only.
        session: notes when this launch of the run has its machines; None: nothing does.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        *,
        is_writer: bool,
        log_every: int,
        peak_flops: float | None,
        total_steps: int,
        synchronize: Callable[[], None] | None = None,
        session: Session | None = None,
    ) -> None:
        self.timers = Timers(synchronize)
        self._session = session if is_writer else None
        self._sinks = tuple(sinks) if is_writer else ()
        self._open = ExitStack()
        self._log_every = log_every
        self._peak_flops = peak_flops
        self._total_steps = total_steps
        self._mark(Progress())

    def start(self, progress: Progress) -> None:
        """Begin, or go on, at `progress`: open the sinks, void what they hold beyond it, start the clock."""
        self.timers.step = progress.step
        if self._session is not None:
            self._session.begin(progress.step)
        for sink in self._sinks:
            sink.open(progress.step)
            self._open.callback(sink.close)
        self._mark(progress)

    def rewind(self, progress: Progress) -> None:
        """Go on at an earlier `progress`: void what was recorded beyond it, start the clock."""
        self.timers.step = progress.step
        if self._session is not None:
            self._session.rewind(progress.step, self._since_record())
        for sink in self._sinks:
            sink.rewind(progress.step)
        self._mark(progress)

    def begin(self, step: int) -> None:
        """Say that step `step` (counted from 1) begins; a step that is due has its parts timed exactly."""
        self.timers.step = step
        if not self._sinks or not self.due(step, step == self._total_steps):
            return
        if self._lap_step != step - 1:
            self._lap(step - 1)
        self.timers.exact = True

    def due(self, step: int, last: bool) -> bool:
        """Whether step `step` (counted from 1) is logged. The same on every rank."""
        return last or step % self._log_every == 0

    def record(
        self,
        *,
        plan: StepPlan,
        progress: Progress,
        last: bool,
        outcome: StepOutcome,
        loss: float,
        domain_loss: Mapping[str, float],
        domain_weight: Mapping[str, float],
        extra: Mapping[str, Any],
        valid: Mapping[str, Any] | None = None,
    ) -> None:
        """Record a step. The loop asks for those that are due, that evaluated or should have, and the last.

        Args:
            plan: what the step did.
            progress: after the step.
            last: whether it ends the run.
            outcome: what became of its gradients.
            loss: mean over the step's valid tokens, of the whole job.
            domain_loss: the same by domain.
            domain_weight: the share of each domain in the step's samples.
            extra: numbers of a technique under its name.
            valid: `loss` and `domain_loss` on the validation split, on steps that evaluated.
        """
        if not self._sinks:
            return
        row: dict[str, Any] = {
            "step": progress.step,
            "samples": progress.samples,
            "tokens": progress.tokens,
            "layer_tokens": progress.layer_tokens,
            "flops": progress.flops,
            "total_steps": progress.totals.steps,
            "total_tokens": progress.totals.tokens,
            "total_flops": progress.totals.flops,
            "loss": loss,
            "grad_norm": outcome.norm,
            "lr": plan.lr,
            "global_batch": plan.global_batch,
            "seq_len": plan.seq_len,
            "skipped": progress.skipped,
            **self._speed(progress),
            "time": time.time(),
            "domain_loss": dict(domain_loss),
            "domain_weight": dict(domain_weight),
        }
        if self._session is not None:
            row |= {"session": self._session.number, "goodput": self._session.share(row)}
        if valid:
            row.update(_validation(valid))
        if outcome.verdict.action is not Action.APPLY:
            row["verdict"] = {"action": outcome.verdict.action.name, "reason": outcome.verdict.reason}
        assert not row.keys() & extra.keys(), f"a technique is called like a key: {row.keys() & extra.keys()}"
        row.update(extra)
        self._mark(progress)
        with self.timers("telemetry"):
            for sink in self._sinks:
                sink.record(StepRecord(row))

    def amend(self, step: int, valid: Mapping[str, Any]) -> None:
        """Add the evaluation to the row of a step that was recorded without it."""
        for sink in self._sinks:
            sink.amend(step, _validation(valid))

    def saved(self, step: int, seconds: float) -> None:
        """Note that the checkpoint of a step is committed; from any thread."""
        if self._session is not None:
            self._session.saved(step, seconds)

    def message(self, text: str) -> None:
        """Show one line to the user; it is kept in the log."""
        for sink in self._sinks:
            sink.message(text)

    def close(self) -> None:
        """Close every sink, the last opened first, so that the terminal still shows what the others say."""
        if self._session is not None:
            self._session.end(self.timers.step, self._since_record())
            self.message(self._session.account().describe())
        self._open.close()

    def _mark(self, progress: Progress) -> None:
        """Start a new interval: speeds are means over the steps since here."""
        self._since = progress
        self._since_time = time.perf_counter()
        self._since_paused = self._paused()
        self._lap(progress.step)

    def _lap(self, step: int) -> None:
        """Measure the parts afresh from the end of `step` on."""
        self._lap_step = step
        self.timers.lap()

    def _paused(self) -> dict[str, float]:
        totals = self.timers.totals
        return {name: totals.get(name, 0.0) for name in PAUSES}

    def _since_record(self) -> dict[str, float]:
        paused = self._paused_since()
        training = time.perf_counter() - self._since_time - sum(paused.values())
        return {"training": training, **paused}

    def _paused_since(self) -> dict[str, float]:
        return {name: now - self._since_paused[name] for name, now in self._paused().items()}

    def _speed(self, progress: Progress) -> dict[str, Any]:
        """Speed over the steps since the last record, and where the time of a step went.

        Evaluation and checkpoints are no training: they are reported on their own, as seconds since the
        last record. `seconds` is a mean per step over the current lap, and adds up to the step.
        """
        wall = time.perf_counter() - self._since_time
        paused = self._paused_since()
        training = wall - sum(paused.values())
        tokens_per_second = (progress.tokens - self._since.tokens) / training
        flops = progress.flops - self._since.flops
        mfu = flops / training / self._peak_flops if self._peak_flops and flops else None
        return {
            "tokens_per_second": tokens_per_second,
            "step_seconds": training / (progress.step - self._since.step),
            "mfu": mfu,
            "wall_seconds": wall,
            **{f"{name}_seconds": seconds for name, seconds in paused.items()},
            "seconds": self._step_parts(progress.step - self._lap_step),
        }

    def _step_parts(self, steps: int) -> dict[str, float]:
        """Mean seconds per step of each part over the current lap of `steps` steps; `other` is the rest."""
        lap = self.timers.lap_seconds
        parts = self.timers.seconds
        lap -= sum(parts.pop(name, 0.0) for name in PAUSES)
        parts["other"] = max(0.0, lap - sum(parts.values()))
        return {name: seconds / steps for name, seconds in parts.items()}


def _validation(valid: Mapping[str, Any]) -> dict[str, Any]:
    return {"valid_loss": valid["loss"], "valid_domain_loss": dict(valid["domain_loss"])}


def build_telemetry(
    run: RunSection,
    tracking: TrackingConfig,
    *,
    config: Mapping[str, Any],
    header: Mapping[str, str],
    preface: Sequence[str],
    ranks: int,
    is_writer: bool,
    log_every: int,
    peak_flops: float | None,
    total_steps: int,
    synchronize: Callable[[], None] | None = None,
) -> Telemetry:
    """The telemetry of a run as its configuration asks for it.

    Args:
        config: the whole resolved configuration as plain values, for config.yaml and wandb.
        header: model, parameters, topology, engine, data, precision and the like, label by label.
        preface: lines for the terminal after it.
        ranks: of the job.

    The other arguments are those of `Telemetry`.

    Raises:
        UserError: a package that was asked for is missing, or wandb has no login.
    """
    sinks: list[Sink] = []
    if is_writer:
        directory = Path(run.dir)
        terminal = Terminal(directory, total_steps, header, preface=preface)
        sinks = [terminal, JsonlSink(directory, header, config)]
        stages = chain_of(directory)
        if stages:
            sinks.append(StagesSink(directory, stages))
        if tracking.kind is TrackingKind.wandb:
            sinks.append(WandbSink(directory, tracking, run.name, config, terminal.message))
        if tracking.tensorboard:
            sinks.append(TensorBoardSink(directory))
    return Telemetry(
        sinks,
        is_writer=is_writer,
        log_every=log_every,
        peak_flops=peak_flops,
        total_steps=total_steps,
        synchronize=synchronize,
        session=Session(Path(run.dir), ranks),
    )
