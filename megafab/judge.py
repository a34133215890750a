"""Models held against each other on the same text: how far apart their logits are.

Each model in turn is loaded on this one process, in fp32, and let go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megafab.checkpoint import store
from megafab.config.schema import RunConfig
from megafab.data.format import Corpus
from megafab.errors import UserError
from megafab.platform import platform
from megafab.telemetry.meter import size
from megafab.topology.groups import shutdown

_ROWS, _LENGTH = 3, 256  # sequences to judge on, and their most tokens


@dataclass(frozen=True, slots=True)
class Agreement:
    """How alike two models predict.

    `kl` is the mean of KL(ours || theirs) in nats a token, `max_abs` the largest difference of a logit.
    """

    kl: float
    max_abs: float


def compare(ours: torch.Tensor, theirs: torch.Tensor) -> Agreement:
    """The agreement of two sets of logits [..., V], in double precision a few tokens at a time."""
    total, largest = 0.0, 0.0
    a, b = ours.flatten(0, -2), theirs.flatten(0, -2)
    for x, y in zip(a.split(64), b.split(64), strict=True):
        x, y = x.double(), y.double()
        largest = max(largest, float((x - y).abs().max()))
        p, q = x.log_softmax(-1), y.log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return Agreement(total / len(a), largest)


def corpus(where: str | None, state: Mapping[str, Any]) -> tuple[Corpus | None, str]:
    """The corpus that the user named, or that of the run if it is still there; or why there is none.

    Args:
        where: a directory; None: the user named none.
        state: of the checkpoint.

    Raises:
        UserError: none is where the user says, or one of another tokenizer.
    """
    named, where = where is not None, where or state["config"].get("data", {}).get("path")
    trained_with = state["data"].get("tokenizer")
    if where is None:
        return None, "no corpus (data=DIR names one)"
    try:
        found = Corpus.open(where)
    except UserError as error:
        if named:
            raise
        return None, f"{error.where}: {error.found} (data=DIR names another place)"
    if trained_with not in (None, found.tokenizer_fingerprint):
        other = f"tokenizer {found.tokenizer_fingerprint[:12]}"
        raise UserError(
            f"data={where}", other, f"{trained_with[:12]}, as in training", "name the run's corpus"
        )
    return found, ""


def text(corpus: Corpus | None, *, seq_len: int, vocab: int) -> tuple[torch.Tensor, str]:
    """Ids [rows, length] to judge on, and what they are.

    Args:
        corpus: where they are read from; None: they are drawn.
        seq_len: the models' longest sequence.
        vocab: ids that may be drawn.
    """
    length = min(_LENGTH, seq_len)
    if corpus:
        streams = [corpus.domain("train", index) for index in range(len(corpus.domains))]
        rows = [torch.from_numpy(stream.read(0, length)) for stream in streams if stream.tokens >= length]
        if rows:
            return torch.stack(rows[:_ROWS]).long(), "real text"
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab, (_ROWS, length), generator=generator), "random ids"


@torch.no_grad()
def logits(
    config: RunConfig, checkpoint: Path, tokens: torch.Tensor, vocab: int, *, prefix: str = store.WEIGHT
) -> torch.Tensor:
    """[rows, length, V] of the model of a checkpoint, on the host.

    Args:
        config: of the run.
        checkpoint: a step directory.
        tokens: ids [rows, length].
        vocab: rows of the embedding.
        prefix: what stands before the global names of the weights to load.
    """
    platform.start(0)
    from megafab.generate import load_model  # Megatron-core must find the platform prepared

    model = load_model(config, checkpoint, vocab, prefix=prefix)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    found = model(tokens.to(platform.device), positions.to(platform.device), None).float().cpu()
    shutdown()
    return found


def require_memory(key: str, needed: int, purpose: str, fix: str) -> None:
    """Refuse what this machine has no room for, before it is begun.

    Args:
        key: of the configuration, that asks for it.
        needed: bytes.
        purpose: what they are for.
        fix: what to do without.

    Raises:
        UserError: they are not there.
    """
    free = _available_memory()
    if free is not None and needed > 0.9 * free:
        raise UserError(key, f"{size(free)} of memory", f"{size(needed)} and some, {purpose}", fix)


def _available_memory() -> int | None:
    """Bytes that this machine can give; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines.splitlines())
    return int(values["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in values else None
