"""When to save, what to keep, where to start from; what a model grows into between two runs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """`resume`: `auto` (this run's newest checkpoint that is intact, else start fresh), `none`, or a path.

    A path is a checkpoint or a run, to start from; once this run has saved since, it continues with that.
    """

    every: int = 0  # steps between saves; 0: only at the end and on a signal
    keep: int = 2  # newest checkpoints kept
    keep_every: int = 0  # checkpoints of steps that are multiples of it are kept for ever; 0: none
    asynchronous: bool = True  # train on while a copy in host memory is written; the last save waits
    resume: str = "auto"
    allow_data_change: bool = (
        False  # resume although tokenizer, data, mixture, packing, seed or length differ
    )
    save_last: bool = True  # save when training ends


class Carry(Enum):
    """What becomes of a part of a checkpoint's state in the run that begins with it."""

    reset = "reset"
    keep = "keep"


@dataclass(frozen=True, slots=True)
class StartConfig:
    """A run that begins with the weights of another: at step 0, with a schedule and techniques of its own.

    Once it has saved, `checkpoint.resume=auto` goes on with that.
    """

    checkpoint: str | None = None  # a checkpoint, or a run for its newest; null: draw weights from train.seed
    optimizer: Carry = Carry.reset  # keep: the moments too, and the count of updates
    data: Carry = Carry.reset  # keep: every domain is read on from where it was, in its order


class Depth(Enum):
    """Where the layers of a deeper model come from (Du et al. 2024, arXiv 2405.15319, section 3.1)."""

    stack = "stack"  # the whole sequence of layers again and again: G_stack
    interleave = "interleave"  # every layer several times in a row
    zero = "zero"  # as interleave, but a copy writes nothing into the residual stream: it is an identity
    random = "random"  # new layers between the old ones, drawn as a new model's
    learned = "learned"  # mixtures of the old ones, trained for some steps (LiGO)


class Width(Enum):
    """Where the new units of a wider model come from: hidden channels, heads, neurons of the feed-forward."""

    direct = "direct"  # copies, whose outgoing weights share the old one's (Net2Net)
    zero = "zero"  # drawn as a new model's, but nothing reads them yet
    random = "random"  # drawn as a new model's
    learned = "learned"  # mixtures of the old ones, trained for some steps (LiGO)


class Moments(Enum):
    """What becomes of the optimizer's state."""

    reset = "reset"  # nothing: a run begins with fresh moments, as in all published results
    copy = "copy"  # it grows with the weights, where that is defined: depth by copies or zero, width by zero


@dataclass(frozen=True, slots=True)
class GrowConfig:
    """What a checkpoint's model grows into; null leaves a size as it is."""

    layers: int | None = None
    hidden: int | None = None  # the size of a head never changes
    heads: int | None = None
    kv_heads: int | None = None  # null: as many query heads to each as before
    ffn: int | None = None
    vocab: int | None = None  # ids of the tokenizer to come; each new row is the mean of the old ones
    experts: int | None = None  # of a dense model: every expert begins as its feed-forward layer
    top_k: int | None = None  # experts a token; null: 2
    every: int | None = None  # every n-th layer gets experts; null: 1
    shared_ffn: int | None = None  # width of an expert that is always on, and begins silent; null: none
    depth: Depth | None = None  # null: stack
    width: Width | None = None  # null: zero
    split: float | None = None  # share of the first copy under width=direct; null: 0.4. At 0.5 two copies
    # would get equal gradients and stay twins; far from it one of them would have little to do
    noise: float | None = None  # added to what is copied, in standard deviations of its tensor; null: none
    seed: int | None = None  # of all that is drawn; null: 1234
    steps: int | None = None  # of training the learned operators; null: 100
    lr: float | None = None  # their learning rate; null: 1e-3
    batch: int | None = None  # sequences of a step; null: 8
    optimizer: Moments = Moments.reset
    preserving: bool = False  # claim that logits stay as they are: refused where they move by 1e-5
    judge: bool = True  # run both models on text and compare their logits; needs 4 bytes a parameter
    data: str | None = None  # corpus to judge on and to learn from; null: that of the run
