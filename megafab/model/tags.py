"""Every parameter's global name and place: what makes weights independent of the topology.

A global name is core's module path with global layer and expert numbers, so `decoder.layers.7.mlp...`
is the same tensor on one rank and at any pipeline, interleaving or expert layout. The copy of tied
embeddings on the last pipeline stage has the embedding's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megafab.model.gpt import GPT
from megafab.topology.groups import Groups
from megafab.topology.layout import Layout

EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True, slots=True, eq=False)
class TaggedParameter:
    """One parameter of this rank.

    `tied` marks the last stage's copy of the embedding; `shared` both copies. `expert` parameters are
    replicated over the expert-data ranks only, the others over all data x context ranks. `tensor_split` is
    false for what every tensor rank holds whole (norms, some biases, the router); where each of them then
    sees a part of the sequence or of the heads only, so that gradients are to be added up, it is
    `tensor_partial`.
    """

    name: str
    parameter: torch.nn.Parameter
    layout: Layout
    expert: bool
    tensor_split: bool
    tensor_partial: bool
    tied: bool
    shared: bool


def tag(chunk: GPT, groups: Groups) -> Iterator[TaggedParameter]:
    """The tagged parameters of one model chunk, in the module's own order."""
    layers: Any = chunk.decoder.layers
    for local_name, parameter in chunk.named_parameters():
        tied = local_name == "output_layer.weight" and chunk.share_embeddings_and_output_weights
        expert = not getattr(parameter, "allreduce", True)
        split = bool(getattr(parameter, "tensor_model_parallel", False)) and not expert
        shape = tuple(parameter.shape)
        layout = (
            Layout.split(
                shape,
                getattr(parameter, "partition_dim"),  # noqa: B009
                groups.mesh.tensor,
                groups.mesh.tensor_rank(groups.rank),
                getattr(parameter, "partition_stride"),  # noqa: B009
            )
            if split
            else Layout.whole(shape)
        )
        name = EMBEDDING if tied else _global_name(local_name, layers, groups)
        partial = not split and not expert and _is_partial(name, parameter, chunk)
        shared = name == EMBEDDING and chunk.share_embeddings_and_output_weights
        yield TaggedParameter(name, parameter, layout, expert, split, partial, tied, shared)


def _is_partial(name: str, parameter: torch.nn.Parameter, chunk: GPT) -> bool:
    """Core's condition for adding up over the tensor ranks (`finalize_model_grads`)."""
    config = chunk.config
    by_sequence = config.sequence_parallel and getattr(parameter, "sequence_parallel", False)
    by_heads = config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
    return by_sequence or by_heads


def freeze(parameter: torch.nn.Parameter) -> None:
    """Mark a parameter that no optimizer is to change; its gradient is for others to leave out."""
    setattr(parameter, "frozen", True)  # noqa: B010


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases, nor to what is frozen."""
    frozen = getattr(parameter, "frozen", False)
    return parameter.dim() > 1 and not name.endswith(".bias") and not frozen


def tag_all(chunks: Sequence[GPT], groups: Groups) -> list[TaggedParameter]:
    """The tagged parameters of all chunks of this rank."""
    return [tagged for chunk in chunks for tagged in tag(chunk, groups)]


def _global_name(local_name: str, layers: Any, groups: Groups) -> str:
    match = re.match(r"(decoder\.layers\.)(\d+)(\..*)", local_name)
    if not match:
        return local_name
    local_layer, rest = int(match[2]), match[3]
    expert = re.match(r"(\.mlp\.experts\.local_experts\.)(\d+)(\..*)", rest)
    if expert:
        here = len(layers[local_layer].mlp.experts.local_experts)
        rest = f"{expert[1]}{groups.expert.rank() * here + int(expert[2])}{expert[3]}"
    return f"{match[1]}{layers[local_layer].layer_number - 1}{rest}"
