"""What was shown to train right, by engine: the one list that rules, README and tests are made from.

A mode is an engine with its stage of ZeRO and its offload. It lists the sets of features that are verified:
for each set, a test trains with all of them at once and compares every loss and gradient norm with one
rank of the Megatron engine (`tests/multiproc/test_capabilities.py`). A configuration is taken when its
features are within a verified set, and refused otherwise: with the reason where one is known, as untested
where not.

`python -m megafab.engine.capabilities` prints the README's table.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from megafab.engine.config import EngineName, Offload


class Feature(Enum):
    """What may go wrong beside plain data parallelism: the key that turns it on, as the table names it."""

    tensor = "tensor"
    sequence = "sequence"
    pipeline = "pipeline"
    interleaved = "interleaved"
    context = "context"
    expert = "expert"
    recompute = "recompute"
    bf16 = "bf16"


_T, _S, _P, _V = Feature.tensor, Feature.sequence, Feature.pipeline, Feature.interleaved
_C, _E, _R, _B = Feature.context, Feature.expert, Feature.recompute, Feature.bf16


@dataclass(frozen=True, slots=True)
class Refusal:
    """Features (none: the whole mode) that cannot be had together, why, and what comes nearest."""

    features: frozenset[Feature]
    reason: str
    nearest: str


@dataclass(frozen=True, slots=True)
class Mode:
    """An engine, its stage of ZeRO and its offload, with what is verified and what is refused."""

    engine: EngineName
    zero_stage: int | None
    offload: Offload
    verified: tuple[frozenset[Feature], ...] = ()
    refused: tuple[Refusal, ...] = ()

    @property
    def name(self) -> str:
        """As the table calls it, such as `ZeRO 2, offload optimizer`."""
        if self.engine is EngineName.megatron:
            return "megatron"
        offload = "" if self.offload is Offload.none else f", offload {self.offload.value}"
        return f"ZeRO {self.zero_stage}{offload}"

    @property
    def overrides(self) -> tuple[str, ...]:
        """What to type for it."""
        if self.engine is EngineName.megatron:
            return ("engine=megatron",)
        offload = () if self.offload is Offload.none else (f"engine.offload={self.offload.value}",)
        return ("engine=deepspeed", f"engine.zero_stage={self.zero_stage}", *offload)

    def refusal(self, features: frozenset[Feature]) -> Refusal | None:
        """Why a configuration with these features is refused; None if it is verified."""
        for refusal in self.refused:
            if refusal.features <= features:
                return refusal
        if any(features <= together for together in self.verified):
            return None
        names = " with ".join(sorted(feature.value for feature in features))
        return Refusal(features, f"{names} was never tested together on {self.name}", "engine=megatron")


_EVERYTHING = (
    frozenset({_T, _S, _P, _C, _E}),
    frozenset({_T, _S, _P, _V, _C, _E, _R}),
    frozenset({_T, _S, _P, _V, _C, _E, _R, _B}),
)
_WITHOUT_STAGES = (frozenset({_T, _S, _C, _E, _R}), frozenset({_T, _S, _C, _E, _R, _B}))

_NO_STAGES = Refusal(
    frozenset({_P}),
    "DeepSpeed wants every rank of the job to hold the same parameters, which pipeline stages do not",
    "engine.zero_stage=2, or parallel.pipeline=1",
)
_PLAIN = Refusal(
    frozenset(),
    "without sharding ZeRO is plain data parallelism, which DeepSpeed does not run under other schedules",
    "engine=megatron, whose optimizer is sharded as in ZeRO 1, or engine.zero_stage=1",
)
_DISKS = Refusal(
    frozenset(),
    "DeepSpeed's operation for asynchronous disk access (libaio) was not at hand, so this was never tested",
    "engine.offload=optimizer",
)
_NOT_PARTITIONED = Refusal(
    frozenset(),
    "only stage 3 partitions parameters, so only there they can be offloaded",
    "engine.zero_stage=3, or engine.offload=optimizer",
)

_DS = EngineName.deepspeed
MODES: tuple[Mode, ...] = (
    Mode(EngineName.megatron, None, Offload.none, _EVERYTHING),
    Mode(_DS, 0, Offload.none, refused=(_PLAIN,)),
    Mode(_DS, 1, Offload.none, _EVERYTHING),
    Mode(_DS, 2, Offload.none, _EVERYTHING),
    Mode(_DS, 3, Offload.none, _WITHOUT_STAGES, (_NO_STAGES,)),
    Mode(_DS, 1, Offload.optimizer, _EVERYTHING),
    Mode(_DS, 2, Offload.optimizer, _EVERYTHING),
    Mode(_DS, 3, Offload.optimizer, _WITHOUT_STAGES, (_NO_STAGES,)),
    Mode(_DS, 3, Offload.parameters, _WITHOUT_STAGES, (_NO_STAGES,)),
    *(Mode(_DS, stage, Offload.parameters, refused=(_NOT_PARTITIONED,)) for stage in (1, 2)),
    *(Mode(_DS, stage, Offload.nvme, refused=(_DISKS,)) for stage in (1, 2, 3)),
)


def mode_of(engine: EngineName, zero_stage: int | None, offload: Offload) -> Mode | None:
    """The mode of a configuration; None if there is none such."""
    wanted = engine, zero_stage, offload
    return next((m for m in MODES if (m.engine, m.zero_stage, m.offload) == wanted), None)


def table() -> str:
    """The README's table, in Markdown: a row a mode, a column a feature, by itself."""
    lines = [
        "| mode | " + " | ".join(feature.value for feature in Feature) + " | all of these at once |",
        "| --- |" + " --- |" * (len(Feature) + 1),
    ]
    notes: list[str] = []
    for mode in MODES:
        whole = next((r for r in mode.refused if not r.features), None)
        if whole:
            cells = [_note(whole, notes)] * (len(Feature) + 1)
        else:
            refusals = [mode.refusal(_with_prerequisites(feature)) for feature in Feature]
            cells = [_note(refusal, notes) if refusal else "yes" for refusal in refusals]
            together = max(mode.verified, key=len)
            missing = [feature.value for feature in Feature if feature not in together]
            cells.append("all but " + ", ".join(missing) if missing else "yes")
        lines.append(f"| {mode.name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{n}. {text}" for n, text in enumerate(notes, 1))]) + "\n"


def _with_prerequisites(feature: Feature) -> frozenset[Feature]:
    needs = {_S: {_T}, _V: {_P}}
    return frozenset({feature} | needs.get(feature, set()))


def _note(refusal: Refusal, notes: list[str]) -> str:
    text = f"Refused: {refusal.reason}. Nearest: {refusal.nearest}."
    if text not in notes:
        notes.append(text)
    return f"no ({notes.index(text) + 1})"


if __name__ == "__main__":
    print(table(), end="")
