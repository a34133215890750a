"""Loss spikes: found by the losses before them, told apart by a replay, undone by going back and skipping.

A step is bad when its loss is far above the median of the steps before it,

    deviation = (loss - median) / (1.4826 MAD),     MAD = median |loss_i - median|

with the factor that makes it a number of standard deviations where losses are normal; a few bad steps move
neither median. The defaults, a window of 128 steps, half full at least, and 6 deviations, are those of
OLMo-core's `SkipStepOptimizer`, which takes mean and standard deviation. Enough bad steps in a row are a
spike. Then

1.  the run goes back to a checkpoint from before it and computes the same steps again. Megafab's steps are
    exact, so that whatever is different now was no part of the computation: deterministic replay, by which
    faulty machines were found in the training of Gemini (arXiv 2312.11805, section 3);
2.  the spike does not come back: its cause was *numeric*, a passing fault of hardware or software. What the
    run has computed since is what it would have without the fault, and nothing is skipped;
3.  or it does: its cause is the *data*, with these weights. The run goes back once more and passes over the
    samples of the bad steps and of `margin` steps before them, as was done in the training of PaLM (Chowdhery
    et al. 2022, arXiv 2204.02311, section 5.1: a checkpoint about 100 steps before the spike, 200 to 500
    batches skipped; the same batches did no harm to other weights).

From there on the run is, to the bit, the one that was told from its beginning to skip those samples
(`data.skip`). What is decided is committed to the checkpoint that was gone back to, before anything else is
computed, so that a crash of the replay resumes it. The price is the loss on the host at every step.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from megafab.data.skips import Stretch
from megafab.errors import UserError
from megafab.resilience.config import SpikesConfig
from megafab.telemetry.rows import to_line

if TYPE_CHECKING:
    from megafab.loss.ledger import LossLedger
    from megafab.run import Progress, StepOutcome

SPIKES_FILE = "spikes.jsonl"  # in the run directory: what was found and decided, one object a line
_NORMAL = 1.4826  # standard deviation of a normal distribution over its median absolute deviation


class HasStretches(Protocol):
    """What a loader shows of its steps, and may be told (`data/loader.py`)."""

    @property
    def last(self) -> Stretch:
        """The samples that the last step went through."""
        ...

    def skip(self, first: int, count: int) -> None:
        """Pass over `count` samples from `first` on."""
        ...


@dataclass(frozen=True, slots=True)
class Spike:
    """Bad steps in a row, enough of them: from step `first` to step `last`, at which it was found.

    `recurs`: it came back in a replay. `facts` are the numbers of step `last`, and `stretches` what the steps
    up to it went through, as far as they are known.
    """

    first: int
    last: int
    recurs: bool
    facts: Mapping[str, float]
    stretches: tuple[Stretch, ...]

    def samples(self, first_step: int) -> Stretch:
        """What was gone through from step `first_step` on."""
        parts = self.stretches[first_step - self.last - 1 :]
        begin, end = parts[0].first, parts[-1].first + parts[-1].count
        counts = tuple(map(sum, zip(*(part.counts for part in parts), strict=True)))
        return Stretch(begin, end - begin, counts)


class Spikes:
    """Judges every step, the same on every rank.

    Args:
        config: when a loss is a spike; None: nothing is looked at.
        loader: of the training split.
        domains: their names, in its order.
        file: where decisions are written; None on all ranks but one.
        message: shows one line to the user.
    """

    def __init__(
        self,
        config: SpikesConfig | None,
        *,
        loader: HasStretches,
        domains: Sequence[str],
        file: Path | None,
        message: Callable[[str], None],
    ) -> None:
        self.on = config is not None
        self._config = config or SpikesConfig()
        self._loader, self._domains = loader, tuple(domains)
        self._file, self._message = file, message
        self._facts: dict[str, float] = {}  # of the last step
        self.rewind({})
        self._suspect: tuple[int, int] | None = None  # first and last step of the spike that is replayed
        self._rollbacks = self._furthest = 0  # within a window of the last step that a spike was found at

    @property
    def margin(self) -> int:
        """Steps before a spike whose samples may be skipped with it."""
        return self._config.margin

    def look(self, progress: Progress, outcome: StepOutcome, ledger: LossLedger) -> Spike | None:
        """Judge the step that has brought the run to `progress`: the spike that it completes, if it does.

        A collective over the job; once after every step.

        Raises:
            UserError: there were `max_rollbacks` and the loss spikes again.
        """
        if not self.on:
            return None
        step, config = progress.step, self._config
        self._stretches.append(self._loader.last)
        self._streak = self._streak + 1 if self._is_bad(ledger.reduced().loss, outcome.norm) else 0
        if self._streak >= config.patience:
            return self._found(step)
        if self._suspect is not None and step >= self._suspect[1]:
            self._acquit(step, self._suspect[0])
        if step > self._furthest + config.window:
            self._rollbacks = 0
        return None

    def decide(self, spike: Spike, progress: Progress) -> None:
        """Back at `progress`, from before a spike: replay it or, if it has come back, skip what it is of."""
        entry = {"step": spike.last, "first": spike.first, "back_to": progress.step, **spike.facts}
        told = f"step {spike.last}: {_described(spike.facts)}"
        if not spike.recurs:
            self._suspect = spike.first, spike.last
            self._log({**entry, "cause": "unknown"})
            since = f" since step {spike.first}" if spike.last > spike.first else ""
            self._message(
                f"{told}: a spike{since}; back to step {progress.step}, to see whether it comes back"
            )
            return
        self._suspect = None
        bad = spike.samples(max(spike.first - self._config.margin, progress.step + 1))
        self._loader.skip(bad.first, bad.count)
        domains = {name: n for name, n in zip(self._domains, bad.counts, strict=True) if n}
        self._log({**entry, "cause": "data", "samples": [bad.first, bad.count], "domains": domains})
        self._message(
            f"{told}: the spike of step {spike.first} has come back, it is of the data; back to step "
            f"{progress.step}, skipping samples {bad.first:,} to {bad.first + bad.count - 1:,} "
            f"({', '.join(f'{name} {n:,}' for name, n in domains.items())})"
        )

    def metrics(self) -> dict[str, dict[str, float]]:
        """How far the last step deviates, as far as that is known, and the rollbacks counted at present."""
        if not self.on:
            return {}
        deviations = {name: value for name, value in self._facts.items() if name.endswith("deviation")}
        return {"spikes": {**deviations, "rollbacks": self._rollbacks}}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, the same on every rank: the history of losses, and the spike that is looked into."""
        if not self.on:
            return {}
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "streak": self._streak,
            "stretches": [[s.first, s.count, list(s.counts)] for s in self._stretches],
            "suspect": self._suspect and list(self._suspect),
            "rollbacks": self._rollbacks,
            "furthest": self._furthest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there; from nothing, where the controller was off."""
        self.rewind(state)
        suspect = state.get("suspect")
        self._suspect = suspect and (suspect[0], suspect[1])
        self._rollbacks, self._furthest = state.get("rollbacks", 0), state.get("furthest", 0)

    def rewind(self, state: Mapping[str, Any]) -> None:
        """Takes the history of a checkpoint, and keeps what is known of the spike that led back to it."""
        config = self._config
        self._losses: deque[float] = deque(state.get("losses", ()), config.window)
        self._norms: deque[float] = deque(state.get("norms", ()), config.window)
        self._streak = int(state.get("streak", 0))
        stretches = (Stretch(first, n, tuple(counts)) for first, n, counts in state.get("stretches", ()))
        self._stretches: deque[Stretch] = deque(stretches, config.margin + config.patience)

    def _is_bad(self, loss: float, norm: float) -> bool:
        """Whether a step is bad by what was before it; then it is part of that."""
        config = self._config
        self._facts = {"loss": loss, "grad_norm": norm}
        bad = not (math.isfinite(loss) and math.isfinite(norm))
        for name, value, threshold, history in (
            ("deviation", loss, config.threshold, self._losses),
            ("norm_deviation", norm, config.norm_threshold, self._norms),
        ):
            if threshold is None:
                continue
            if math.isfinite(value) and len(history) >= config.min_steps:
                self._facts[name] = deviation(value, history)
                bad |= self._facts[name] > threshold
            if math.isfinite(value):
                history.append(value)
        return bad

    def _found(self, step: int) -> Spike:
        config, first = self._config, step - self._streak + 1
        if self._rollbacks == config.max_rollbacks:
            raise UserError(
                f"resilience.spikes.max_rollbacks={config.max_rollbacks}",
                f"a spike again at step {step} ({_described(self._facts)}), after as many rollbacks",
                "to get past it by going back and skipping data",
                "lower optim.lr or optim.clip and resume from an earlier checkpoint; or raise "
                "resilience.spikes.threshold, if this is no spike",
            )
        self._rollbacks += 1
        self._furthest = max(self._furthest, step)
        recurs = self._suspect is not None and self._suspect[0] <= first <= self._suspect[1]
        return Spike(first, step, recurs, dict(self._facts), tuple(self._stretches))

    def _acquit(self, step: int, first: int) -> None:
        self._suspect = None
        self._log({"step": step, "first": first, "cause": "numeric", **self._facts})
        self._message(
            f"step {step}: the spike of step {first} has not come back: its cause was numeric, a passing "
            "fault of hardware or software; nothing is skipped"
        )

    def _log(self, entry: Mapping[str, Any]) -> None:
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(to_line({**entry, "time": time.time()}))
                file.flush()
                os.fsync(file.fileno())


def deviation(value: float, history: Sequence[float]) -> float:
    """How far a value lies above the median of others, in deviations; infinite over a MAD of 0."""
    middle = median(history)
    spread = _NORMAL * median(abs(other - middle) for other in history)
    above = value - middle
    if not spread:
        return math.copysign(math.inf, above) if above else 0.0
    return above / spread


def _described(facts: Mapping[str, float]) -> str:
    """`loss 9.1 (12.3 deviations above the median), gradient norm 4.5`."""
    parts = []
    for label, value, deviates in (
        ("loss", "loss", "deviation"),
        ("gradient norm", "grad_norm", "norm_deviation"),
    ):
        by = f" ({facts[deviates]:.1f} deviations above the median)" if deviates in facts else ""
        parts.append(f"{label} {facts[value]:.4g}{by}")
    return ", ".join(parts)
