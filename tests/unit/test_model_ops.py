"""The model's own operators against plain ones in fp64: values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F


def gated(rank, world, activation, dtype):
    """Output and input gradient of the gated unit, and of the two halves multiplied in fp64."""
    from megatron.core.transformer import TransformerConfig

    from megafab.model.activation import ActivationUnit

    generator = torch.Generator().manual_seed(0)
    both = torch.randn(3, 2, 10, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(3, 2, 5, generator=generator).to(dtype)
    unit = ActivationUnit(
        TransformerConfig(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=1,
            gated_linear_unit=True,
            activation_func=activation,
            add_bias_linear=False,
        )
    )
    out = unit(both)
    out.backward(grad)
    exact = both.detach().double().requires_grad_()
    gate, linear = exact.chunk(2, dim=-1)
    expected = activation(gate) * linear
    expected.backward(grad.double())
    return out.detach(), both.grad, expected.detach(), exact.grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("activation", [F.silu, F.gelu])
def test_gated_unit(ranks, activation, dtype, tolerance):
    ((out, grad, expected, expected_grad),) = ranks.run(gated, activation, dtype)
    assert (out.dtype, grad.dtype) == (dtype, dtype)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=tolerance, atol=tolerance)


def rms_norm(rank, world, dtype, strided):
    """Output and gradients of RMSNorm as the model has it, and of its formula in fp64."""
    from megatron.core.transformer import TransformerConfig

    from megafab.model.norms import Norm

    config = TransformerConfig(
        num_layers=1, hidden_size=6, num_attention_heads=1, normalization="RMSNorm", params_dtype=dtype
    )
    generator = torch.Generator().manual_seed(0)
    norm = Norm(config, 6, eps=1e-3)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=generator)
    leaf = (torch.randn(4, 3, 12, generator=generator) + 1.0).to(dtype).requires_grad_()
    grad = torch.randn(4, 3, 6, generator=generator).to(dtype)
    part = slice(6, 12) if strided else slice(0, 12, 2)
    out = norm(leaf[..., part] if strided else leaf[..., part].contiguous())
    out.backward(grad)

    exact = leaf.detach().double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    hidden = exact[..., part]
    expected = hidden / (hidden.square().mean(dim=-1, keepdim=True) + 1e-3).sqrt() * weight
    expected.backward(grad.double())
    found = (out.detach(), leaf.grad, norm.weight.grad)
    return [x.double() for x in found], [expected.detach(), exact.grad, weight.grad], out.dtype


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "a part of each row"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_rms_norm(ranks, dtype, tolerance, strided):
    ((found, expected, out_dtype),) = ranks.run(rms_norm, dtype, strided)
    assert out_dtype is dtype
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def nll_in_blocks(rank, world):
    """A vocabulary so wide that a block takes three of the eight tokens, with the last block short."""
    from megafab.kernels.cross_entropy import _BLOCK
    from megafab.loss.cross_entropy import token_losses

    logits = torch.randn(8, 1, _BLOCK // 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    labels = torch.arange(8).unsqueeze(-1) * 7
    grad = torch.linspace(-1.0, 2.0, 8).unsqueeze(-1)
    nll = token_losses(logits, labels, dist.group.WORLD).nll
    nll.backward(grad)
    expected = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="none").unsqueeze(-1)
    expected.backward(grad.double())
    worst = (logits.grad - exact.grad).abs().max() / exact.grad.abs().max()
    return (nll.detach() - expected.detach()).abs().max().item(), worst.item()


def test_cross_entropy_in_blocks(ranks):
    ((value_error, gradient_error),) = ranks.run(nll_in_blocks)
    assert value_error < 5e-6
    assert gradient_error < 1e-6


def in_parts(rank, world, groups, masked):
    """Attention with its scores in memory, and PyTorch's: outputs and gradients."""
    from megafab.model.attention import attend, attend_in_parts

    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 4, 6, 5), (2, groups, 6, 5), (2, groups, 6, 5))
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril() if masked else None
    if mask is not None:
        mask[1, :, 3:, :2] = False
    both = []
    for function in (attend_in_parts, attend):
        given = [
            torch.randn(*s, generator=generator.manual_seed(n)).requires_grad_() for n, s in enumerate(sizes)
        ]
        out = function(*given, mask, 0.0, causal=not masked, scale=0.3)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        both.append([out.detach(), *(x.grad for x in given)])
    return both


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("groups", [4, 2])
def test_attention_in_parts_is_attention(ranks, groups, masked):
    ((found, expected),) = ranks.run(in_parts, groups, masked)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
