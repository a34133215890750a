"""From a model's configuration to Megatron-core's: TransformerConfig, layer specs, and the built chunks.

The plan stands before any module exists: techniques edit it (`Technique.on_plan`), then `build` makes
this rank's pipeline chunks from it and gives them their initial weights.
"""

# Core annotates less than it takes: block submodules, functions and null where it says ModuleSpec.
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megafab.kernels.activation import FUNCTIONS
from megafab.model.activation import ActivationUnit
from megafab.model.attention import CoreAttention, RopeSelfAttention
from megafab.model.config import ModelConfig, Norm, Position
from megafab.model.gpt import GPT
from megafab.model.init import initialize
from megafab.model.layer import FeedForward, Layer, get_bias_dropout_add
from megafab.model.moe import Router
from megafab.model.norms import Norm as NormLayer
from megafab.model.retro import Sizes, at_stage_boundary, looks_at_neighbors
from megafab.model.shape import ModelShape
from megafab.model.tags import freeze, tag_all
from megafab.platform import platform
from megafab.topology.config import ContextMethod
from megafab.topology.groups import Groups


@dataclass(slots=True)
class ModelPlan:
    """Everything that decides the modules; techniques may change any of it.

    `layer_spec(layer)` gives the spec of global layer `layer` (from 0), `frozen` the names of parameters that
    no optimizer is to change.
    """

    shape: ModelShape
    transformer: TransformerConfig
    layer_spec: Callable[[int], ModuleSpec]
    frozen: frozenset[str] = frozenset()


def plan(
    shape: ModelShape,
    groups: Groups,
    *,
    precision: torch.dtype,
    recompute: str,
    sequence_parallel: bool,
    context_method: ContextMethod,
) -> ModelPlan:
    """The plan of a model on a mesh.

    Args:
        shape: the model's sizes.
        groups: this rank's place.
        precision: dtype of weights and activations.
        recompute: `none`, `selective` (attention) or `full` (every layer).
        sequence_parallel: split norms and dropout over the tensor ranks.
        context_method: how sequences are split over context ranks.
    """
    transformer = _transformer_config(shape, groups, precision, recompute, sequence_parallel)
    core_attention = type("CoreAttention", (CoreAttention,), {"context_method": context_method})
    attention = _attention_spec(shape.config, core_attention)
    specs = _layer_spec(attention, FeedForward), _layer_spec(attention, _moe_spec(shape.config))
    looking = specs
    if shape.retro_layers:
        sizes = _retro_sizes(shape)
        looking = tuple(looks_at_neighbors(spec, sizes, attention) for spec in specs)

    def layer_spec(layer: int) -> ModuleSpec:
        return (looking if layer in shape.retro_layers else specs)[shape.is_moe_layer(layer)]

    return ModelPlan(shape, transformer, layer_spec)


def build(plan: ModelPlan, groups: Groups, seed: int) -> list[GPT]:
    """This rank's model chunks (one, or `virtual_pipeline` of them) with their initial weights."""
    mesh, config = groups.mesh, plan.shape.config
    stage = mesh.pipeline_rank(groups.rank)
    chunks = []
    for chunk in range(mesh.virtual_pipeline):
        layers = mesh.layers_of(config.layers, stage, chunk)
        is_first = groups.is_first_stage and chunk == 0
        is_last = groups.is_last_stage and chunk == mesh.virtual_pipeline - 1
        specs = [plan.layer_spec(layer) for layer in layers]
        if config.retro.chunk:
            _carry_neighbors(specs, _retro_sizes(plan.shape), receives=not is_first, sends=not is_last)
        model = GPT(
            config=plan.transformer,
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=specs, layer_norm=NormLayer),
            vocab_size=plan.shape.vocab,
            max_sequence_length=config.seq_len,
            pre_process=is_first,
            post_process=is_last,
            parallel_output=True,
            share_embeddings_and_output_weights=config.tied_embeddings,
            position_embedding_type="learned_absolute" if config.position is Position.learned else "none",
            vp_stage=chunk if mesh.virtual_pipeline > 1 else None,
        )
        if config.position is Position.rope:
            model.rope_base = config.rope_base
        _mark_experts(model)
        chunks.append(model.to(device=platform.device, dtype=plan.transformer.params_dtype))
    tagged = tag_all(chunks, groups)
    for t in tagged:
        if t.name in plan.frozen:
            freeze(t.parameter)
    initialize(tagged, config, seed)
    return chunks


def _carry_neighbors(specs: list[ModuleSpec], sizes: Sizes, *, receives: bool, sends: bool) -> None:
    """The layers of a pipeline chunk that meet others': one and the same, where a chunk is one layer."""
    last = len(specs) - 1
    for layer in {0, last}:
        mine = {"receives": receives and layer == 0, "sends": sends and layer == last}
        if any(mine.values()):
            specs[layer] = at_stage_boundary(specs[layer], sizes, **mine)


def _retro_sizes(shape: ModelShape) -> Sizes:
    return Sizes.of(shape, rope=shape.config.position is Position.rope)


def _mark_experts(model: GPT) -> None:
    """Have experts reduced over all ranks that hold a copy, the tensor ranks among them.

    Core marks them so only where they are spread over expert ranks. Elsewhere it takes them for split over
    the tensor ranks, which with an expert tensor size of 1 each hold them whole.
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            setattr(parameter, "allreduce", False)  # noqa: B010


def _transformer_config(
    shape: ModelShape, groups: Groups, precision: torch.dtype, recompute: str, sequence_parallel: bool
) -> TransformerConfig:
    config, mesh, moe = shape.config, groups.mesh, shape.config.moe
    interleaved = mesh.virtual_pipeline > 1
    options: dict = {}
    if moe.experts:
        options.update(
            num_moe_experts=moe.experts,
            moe_layer_freq=[int(shape.is_moe_layer(layer)) for layer in range(config.layers)],
            moe_router_topk=moe.top_k,
            # Of one chosen expert the softmax is 1 and teaches the router nothing: take it over all experts
            # (Fedus et al. 2021); of several, over the chosen (Mixtral).
            moe_router_pre_softmax=moe.top_k == 1,
            moe_ffn_hidden_size=shape.expert_ffn,
            moe_shared_expert_intermediate_size=moe.shared_ffn or None,
            moe_router_load_balancing_type="aux_loss" if moe.aux_loss else "none",
            moe_aux_loss_coeff=moe.aux_loss,
            moe_z_loss_coeff=moe.z_loss or None,
            moe_expert_capacity_factor=moe.capacity_factor,
            moe_token_dispatcher_type="alltoall",
            moe_router_dtype="fp32",
        )
    if recompute == "selective":
        options.update(recompute_granularity="selective", recompute_modules=["core_attn"])
    elif recompute == "full":
        options.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    return TransformerConfig(
        num_layers=config.layers,
        hidden_size=config.hidden,
        num_attention_heads=config.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        normalization="LayerNorm" if config.norm is Norm.layernorm else "RMSNorm",
        layernorm_epsilon=config.norm_eps,
        activation_func=FUNCTIONS[config.activation.value],
        gated_linear_unit=shape.gated,
        # Core's name for an activation from the spec, which it takes for few: that of gated experts.
        use_te_activation_func=shape.gated,
        add_bias_linear=config.bias,
        qk_layernorm=config.qk_norm,
        hidden_dropout=config.dropout,
        attention_dropout=config.dropout,
        # init.py gives the weights their values; core's own initialisers only mark how they are split.
        init_method=_leave,
        output_layer_init_method=_leave,
        params_dtype=precision,
        pipeline_dtype=precision,
        bf16=precision is torch.bfloat16,
        tensor_model_parallel_size=mesh.tensor,
        pipeline_model_parallel_size=mesh.pipeline,
        virtual_pipeline_model_parallel_size=mesh.virtual_pipeline if interleaved else None,
        context_parallel_size=mesh.context,
        expert_model_parallel_size=mesh.expert,
        expert_tensor_parallel_size=1,
        sequence_parallel=sequence_parallel,
        # The loss is summed over tokens and divided once by the step's global count (engine/schedule.py).
        calculate_per_token_loss=True,
        # Freeing an output while its send is in flight is safe on a CUDA stream; gloo would send the next
        # tensor that takes the memory.
        deallocate_pipeline_outputs=mesh.pipeline > 1 and (platform.is_cuda or not interleaved),
        # With batched exchanges the interleaved schedule on two stages trains wrongly in silence.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        attention_backend=None,
        **options,
    )


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


_EXPERT_PARTS = MLPSubmodules(
    linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear, activation_func=ActivationUnit
)


def _moe_spec(config: ModelConfig) -> ModuleSpec:
    shared = ModuleSpec(module=SharedExpertMLP, submodules=_EXPERT_PARTS) if config.moe.shared_ffn else None
    experts = ModuleSpec(module=SequentialMLP, submodules=_EXPERT_PARTS)
    return ModuleSpec(
        module=MoELayer, submodules=MoESubmodules(experts=experts, shared_experts=shared, router=Router)
    )


def _attention_spec(config: ModelConfig, core_attention: type) -> ModuleSpec:
    head_norm = NormLayer if config.qk_norm else IdentityOp
    return ModuleSpec(
        module=RopeSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=core_attention,
            linear_proj=RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


def _layer_spec(attention: ModuleSpec, mlp: ModuleSpec | type[FeedForward]) -> ModuleSpec:
    return ModuleSpec(
        module=Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=NormLayer,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=NormLayer,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
