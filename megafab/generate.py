"""Text from a checkpoint: load the weights on one process, sample token by token.

Without a key-value cache: every token runs the whole window again. It is for looking at a model, not for
serving one. A model with retrieval is given the neighbours of each whole chunk of what is there so far,
searched for as soon as the chunk is complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megafab.checkpoint import store
from megafab.checkpoint.pieces import whole
from megafab.config.schema import RunConfig
from megafab.kernels import dispatch
from megafab.kernels.config import Kernels
from megafab.model import plan as model_plan
from megafab.model.gpt import GPT
from megafab.model.shape import ModelShape
from megafab.model.tags import tag_all
from megafab.platform import platform
from megafab.retrieval import LiveRetrieval
from megafab.topology import groups as topology
from megafab.topology.groups import Groups
from megafab.topology.mesh import Mesh


def load_model(
    config: RunConfig,
    step_directory: Path,
    tokenizer_vocab: int,
    *,
    prefix: str = store.WEIGHT,
    groups: Groups | None = None,
) -> GPT:
    """The model of a run on this one process, in fp32, with the weights of a checkpoint.

    Args:
        config: of the run.
        step_directory: the checkpoint.
        tokenizer_vocab: ids of the tokenizer.
        prefix: what stands before the global names of the weights to load.
        groups: those of one rank; None: they are made here.
    """
    groups = groups or topology.initialize(Mesh(1), seed=config.train.seed)
    model = new_model(config, tokenizer_vocab, groups)
    tensors = {
        prefix + t.name: whole(t.parameter.data, t.layout, owner=True) for t in tag_all([model], groups)
    }
    store.load(step_directory, tensors)
    return model.eval()


def new_model(config: RunConfig, tokenizer_vocab: int, groups: Groups) -> GPT:
    """The model of a run on this one process, in fp32, as it is before training.

    Args:
        config: of the run.
        tokenizer_vocab: ids of the tokenizer.
        groups: those of one rank.
    """
    dispatch.set_up(Kernels.auto)
    plan = model_plan.plan(
        ModelShape.of(config.model, tokenizer_vocab),
        groups,
        precision=torch.float32,
        recompute="none",
        sequence_parallel=False,
        context_method=config.parallel.context_method,
    )
    (model,) = model_plan.build(plan, groups, config.train.seed)
    return model


@torch.no_grad()
def sample(
    model: GPT,
    prompt: Sequence[int],
    *,
    vocab: int,
    tokens: int,
    temperature: float,
    top_k: int,
    eod: int,
    generator: torch.Generator,
    live: LiveRetrieval | None = None,
) -> list[int]:
    """Token ids that continue `prompt`, up to `tokens` of them or the end of the document.

    Args:
        prompt: at least one id; only the last `seq_len` count.
        vocab: the tokenizer's size; the rows that pad the embedding beyond it are never sampled.
        tokens: most ids to add.
        temperature: 0 takes the most likely token.
        top_k: sample among the k most likely; 0 among all.
        eod: the id that ends a document.
        generator: on the host, what the samples are drawn with.
        live: where neighbours come from, for a model that looks at them; None: it goes without.
    """
    ids = list(prompt)
    for _ in range(tokens):
        if live is None:
            window = torch.tensor([ids[-model.max_sequence_length :]], device=platform.device)
            positions = torch.arange(window.shape[1], device=platform.device).unsqueeze(0)
            found = model(window, positions, None)[0, -1]
        else:
            found = live.logits(model, ids)
        logits = found[:vocab].float().cpu()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            if top_k:
                logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -torch.inf
            chances = torch.softmax(logits / temperature, dim=-1)
            token = int(torch.multinomial(chances, 1, generator=generator))
        if token == eod:
            break
        ids.append(token)
    return ids[len(prompt) :]
