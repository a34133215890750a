"""Settings of every technique. A technique is on when its field is not null: `technique=[z_loss,ema]`.

Kept apart from the code so that a configuration is checked without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


@dataclass(frozen=True, slots=True)
class ZLossConfig:
    """`techniques/z_loss.py`."""

    weight: float = 1e-4


@dataclass(frozen=True, slots=True)
class LabelSmoothingConfig:
    """`techniques/label_smoothing.py`."""

    epsilon: float = 0.1  # share of the target that is spread over the vocabulary


@dataclass(frozen=True, slots=True)
class EMAConfig:
    """`techniques/ema.py`."""

    decay: float = 0.999
    every: int = 1  # steps between updates of the average
    evaluate: bool = True  # evaluate with the averaged weights


class MixingMode(Enum):
    """Which of the two algorithms of online data mixing: they differ much (`techniques/online_mixing.py`)."""

    released = "released"  # the authors' code: shares of the mean rewards
    paper = "paper"  # as printed: EXP3 with mean rewards


class Reward(Enum):
    """What a domain is rewarded for."""

    loss = "loss"
    perplexity = "perplexity"
    bits_per_byte = "bits_per_byte"  # makes domains comparable that the tokenizer cuts up differently
    excess = "excess"  # the loss above techniques.online_mixing.reference
    decrease = "decrease"  # how far the loss is below its own moving average


@dataclass(frozen=True, slots=True)
class OnlineMixingConfig:
    """`techniques/online_mixing.py`."""

    mode: MixingMode = MixingMode.released
    reward: Reward | None = None  # null: perplexity if released, loss if paper
    smoothing: float | None = None  # weight of the old mean reward; null: 0.5 if released, 0.9 if paper
    warmup_steps: int = 0  # steps at the mixture the run begins with
    every: int = 1  # steps between two decisions
    reference: dict[str, float] = field(default_factory=dict[str, float])  # losses by domain, for excess
    reward_scale: float = 1.0  # paper only
    exploration_floor: float = 0.0  # of the exploration, which otherwise goes to 0
    max_loss: float = 12.0  # nats; a larger loss counts as this


@dataclass(frozen=True, slots=True)
class DynamicLoadingConfig:
    """`techniques/dynamic_loading.py`. References are given, or fitted to losses of models of three sizes."""

    reference: dict[str, float] = field(default_factory=dict[str, float])  # target loss of each domain
    fit_sizes: list[float] = field(default_factory=list[float])  # three parameter counts
    fit_losses: dict[str, list[float]] = field(default_factory=dict[str, list[float]])  # of each, by domain
    clamp_excess: bool = True  # as in the paper; false: a loss below its reference lowers the weight
    smoothing: float = 0.0  # share of the uniform mixture in every new one; the released code has 1e-4


@dataclass(frozen=True, slots=True)
class ReplayConfig:
    """`techniques/replay.py`."""

    domains: list[str] = MISSING  # those of the earlier training
    share: float = 0.05  # of the samples, exactly
    seed: int | None = None  # train.seed of the earlier run, for its order; null: this run's


class Strategy(Enum):
    """Which samples get the weight, by their place h in [-1, 1] between the smallest and largest loss."""

    linupper = "linupper"  # rising to the middle, level above: low losses count less
    quadratic = "quadratic"  # the middle
    extremes = "extremes"  # both ends


class Population(Enum):
    """The samples that are weighed together."""

    micro_batch = "micro_batch"  # of all data ranks: train.micro_batch x data ranks
    batch = "batch"  # the global batch; costs a forward pass more when it has several micro-batches


@dataclass(frozen=True, slots=True)
class SampleReweightingConfig:
    """`techniques/sample_reweighting.py`."""

    strategy: Strategy = Strategy.linupper
    temperature: float = 1.0  # r; the larger, the closer to uniform weights
    warmup_steps: int = 1000  # of uniform weights
    start_temperature: float | None = None  # after the warm-up; null: temperature
    temperature_steps: int = 0  # from start_temperature to temperature, geometrically
    quantile: float = 0.0  # losses below this share of samples, and above 1 - it, count as its edge; 0: none
    over: Population = Population.micro_batch


@dataclass(frozen=True, slots=True)
class TokenSelectionConfig:
    """`techniques/token_selection.py`."""

    reference: str = MISSING  # a directory of scores, made by megafab score
    keep: float = 0.6  # share of each sequence's tokens
    warmup_steps: int = 0  # of all tokens


@dataclass(frozen=True, slots=True)
class TokenDroppingConfig:
    """`techniques/token_dropping.py`."""

    start: int = 128  # tokens of a sequence that a dropping layer keeps in the first step
    steps: float = 0.7  # steps until it keeps all; below 1: a share of the run
    round_to: int = 16  # in between, a multiple of this
    layers: tuple[int, ...] | None = None  # which drop, from 0; null: all but the first and the last

    def dropping(self, layers: int) -> tuple[int, ...]:
        """The layers that drop tokens in a model of so many."""
        return tuple(range(1, layers - 1)) if self.layers is None else self.layers


class PacingShape(Enum):
    """How a difficulty gets from its start to its end."""

    linear = "linear"
    root = "root"  # fast at first: (step / steps) ^ (1 / degree)
    step = "step"  # a level until its last step, then the next
    custom = "custom"  # as a function of yours says


@dataclass(frozen=True, slots=True)
class PacingConfig:
    """`techniques/pacing.py`. Each shape needs its own keys, and takes no others."""

    shape: PacingShape = PacingShape.linear
    start: float | None = None  # difficulty of the first step
    end: float | None = None  # difficulty of the last step, and of all after it
    steps: int | None = None  # of shape=linear and root: the step at which the end is reached
    degree: float | None = None  # of shape=root; 2 is the square root
    round_to: float = 1  # a difficulty on the way is rounded down to a multiple of this
    levels: tuple[float, ...] | None = None  # of shape=step
    last_steps: tuple[int, ...] | None = None  # of shape=step: of each level but the last
    function: str | None = None  # of shape=custom: package.module:function, step (from 1) -> number


class DifficultyKind(Enum):
    """What a curriculum's difficulty is a number of."""

    percentile = "percentile"  # the easiest d percent of each domain's windows
    threshold = "threshold"  # the windows whose metric is at most d


@dataclass(frozen=True, slots=True)
class CurriculumConfig:
    """`techniques/curriculum.py`."""

    difficulty: str = MISSING  # of `megafab data difficulty`: its name below the corpus, or its path
    kind: DifficultyKind = DifficultyKind.percentile
    pacing: PacingConfig = field(default_factory=PacingConfig)


class SequenceMode(Enum):
    """What becomes of a sequence that is longer than the length of the step."""

    truncate = "truncate"  # its beginning is read, the rest is left out
    reshape = "reshape"  # it is cut into several sequences


@dataclass(frozen=True, slots=True)
class SequenceCurriculumConfig:
    """`techniques/sequence_curriculum.py`."""

    mode: SequenceMode = SequenceMode.truncate
    pacing: PacingConfig = field(default_factory=PacingConfig)


class SparsityPattern(Enum):
    """Which weights a mask may keep."""

    unstructured = "unstructured"  # any
    two_four = "two_four"  # of every four inputs of an output, two


@dataclass(frozen=True, slots=True)
class StaticSparsityConfig:
    """`techniques/static_sparsity.py`."""

    pattern: SparsityPattern = SparsityPattern.unstructured
    sparsity: float | None = None  # share of each matrix that is 0; null: 0.75 if unstructured, else 0.5
    seed: int | None = None  # that the masks are drawn from; null: train.seed

    @property
    def share(self) -> float:
        """The share of each matrix that is 0."""
        if self.sparsity is not None:
            return self.sparsity
        return 0.75 if self.pattern is SparsityPattern.unstructured else 0.5


class Ramp(Enum):
    """How the sparsity gets from 0 to its end, over the share u of the ramp's compute that is spent."""

    cubic = "cubic"  # most of it early: 1 - (1 - u)^3
    linear = "linear"


@dataclass(frozen=True, slots=True)
class GradualPruningConfig:
    """`techniques/gradual_pruning.py`. Shares are of the run's compute, not of its steps."""

    sparsity: float = 0.5  # share of each matrix that is 0 in the end
    begin: float = 0.25  # share of the compute spent on the dense model
    end: float = 0.75  # share of the compute after which the masks stay
    ramp: Ramp = Ramp.cubic
    every: int = 100  # steps between two prunings


@dataclass(frozen=True, slots=True)
class FreezingConfig:
    """`techniques/freezing.py`."""

    # Names of the parameters that are trained, with * for anything, as `megafab ckpt inspect` lists them.
    trained: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, slots=True)
class TechniquesConfig:
    """One optional field a technique; the field's name is the technique's name everywhere."""

    z_loss: ZLossConfig | None = None
    label_smoothing: LabelSmoothingConfig | None = None
    ema: EMAConfig | None = None
    online_mixing: OnlineMixingConfig | None = None
    dynamic_loading: DynamicLoadingConfig | None = None
    replay: ReplayConfig | None = None
    sample_reweighting: SampleReweightingConfig | None = None
    token_selection: TokenSelectionConfig | None = None
    token_dropping: TokenDroppingConfig | None = None
    curriculum: CurriculumConfig | None = None
    sequence_curriculum: SequenceCurriculumConfig | None = None
    static_sparsity: StaticSparsityConfig | None = None
    gradual_pruning: GradualPruningConfig | None = None
    freezing: FreezingConfig | None = None
