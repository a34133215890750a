"""The cross-entropy over a split vocabulary against torch's own over the whole one, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megafab.loss.cross_entropy import token_losses
from megafab.loss.head import LossHead

LENGTH, ROWS, VOCAB = 5, 3, 24


def ordinary() -> torch.Tensor:
    return torch.randn(LENGTH, ROWS, VOCAB, generator=torch.Generator().manual_seed(0)) * 3


def huge() -> torch.Tensor:
    """Logits of +-1e4, whose exponentials are far out of fp32's range; some labels at the very bottom."""
    return torch.where(ordinary() > 0, 1e4, -1e4) + ordinary()


def peaks_apart() -> torch.Tensor:
    """Every shard has a maximum of its own, 1e4 above the next shard's."""
    return ordinary() + 1e4 * (torch.arange(VOCAB) // 6)


CASES = {"ordinary": ordinary, "huge": huge, "peaks apart": peaks_apart}


def labels() -> torch.Tensor:
    """The first and last id of every shard of a split by 4 are among them."""
    ids = [0, 5, 6, 11, 12, 17, 18, 23, *range(7)]
    return torch.tensor(ids).view(LENGTH, ROWS)


def upstream() -> torch.Tensor:
    """Gradients of the losses: the loss mask and the token weights of real use, a zero among them."""
    return torch.linspace(-1.0, 2.5, LENGTH * ROWS).view(LENGTH, ROWS) * (labels() != 12)


def split(rank, world, case, dtype, expected=None):
    """The nll and this rank's part of the logits' gradient."""
    mine = CASES[case]().to(dtype).chunk(world, dim=-1)[rank].clone().requires_grad_()
    before = mine.detach().clone()
    with torch.no_grad():
        unasked = token_losses(mine, labels(), dist.group.WORLD, expected=expected).nll
    assert torch.equal(mine.detach(), before), "without a gradient the logits stay"
    nll = token_losses(mine, labels(), dist.group.WORLD, expected=expected).nll
    torch.testing.assert_close(nll.detach(), unasked, rtol=1e-6, atol=1e-6)
    nll.backward(upstream())
    return nll.detach(), mine.grad


def whole(case, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from torch on the unsplit logits: of the rounded logits, but computed in fp64."""
    logits = CASES[case]().to(dtype).double().requires_grad_()
    nll = F.cross_entropy(logits.flatten(0, 1), labels().flatten(), reduction="none").view(LENGTH, ROWS)
    nll.backward(upstream().double())
    return nll.detach(), logits.grad


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_fp32_equals_torch(ranks, tensor, case):
    results = ranks.run(split, case, torch.float32, world=tensor)
    nll, gradient = whole(case, torch.float32)
    for found, _ in results:
        assert found.dtype is torch.float32
        torch.testing.assert_close(found.double(), nll, rtol=1e-6, atol=2e-6)
    found = torch.cat([part for _, part in results], dim=-1)
    torch.testing.assert_close(found.double(), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_bf16_logits_cost_only_the_rounding_of_the_gradient(ranks, tensor):
    results = ranks.run(split, "ordinary", torch.bfloat16, world=tensor)
    nll, gradient = whole("ordinary", torch.bfloat16)
    for found, part in results:
        assert (found.dtype, part.dtype) == (torch.float32, torch.bfloat16)
        torch.testing.assert_close(found.double(), nll, rtol=1e-6, atol=2e-6)
    found = torch.cat([part for _, part in results], dim=-1)
    # bf16 keeps 8 bits: half a unit in the last place is 2^-9 of the value.
    torch.testing.assert_close(found.double(), gradient, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("case", CASES)
def test_a_gradient_that_was_not_expected_costs_one_more_rounding(ranks, case, dtype, rtol):
    """Some tokens are given what was expected, the others anything from none to the opposite."""
    expected = upstream()[2, 1]
    ((nll, found),) = ranks.run(split, case, dtype, expected)
    exact, gradient = whole(case, dtype)
    torch.testing.assert_close(nll.double(), exact, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(found.double(), gradient, rtol=rtol, atol=1e-6)


def smoothed(logits, labels, group, chunk=None, weight=None):
    """A loss of all that the logits come to, each token weighed: nll, log_z and mean logit."""
    head = LossHead(group, chunk)
    layer = head.layer(labels)
    output = logits if layer is None else layer(logits, weight, False)
    losses = head.losses(output, labels)
    return weighed(losses.nll, losses.log_z, losses.mean_logit, upstream())


def smoothed_whole(logits, labels):
    """The same from torch."""
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(LENGTH, ROWS)
    return weighed(nll, logits.logsumexp(-1), logits.mean(-1), upstream().double())


def weighed(nll, log_z, mean, weights):
    """Each token of each with a weight of its own."""
    return (nll * weights + log_z.square() * weights.flip(0) + mean * weights.flip(1)).sum()


def split_losses(rank, world, dtype):
    mine = ordinary().to(dtype).chunk(world, dim=-1)[rank].clone().requires_grad_()
    total = smoothed(mine, labels(), dist.group.WORLD)
    total.backward()
    return total.item(), mine.grad


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_normaliser_and_mean_have_gradients(ranks, tensor, dtype, rtol):
    logits = ordinary().to(dtype).double().requires_grad_()
    total = smoothed_whole(logits, labels())
    total.backward()
    results = ranks.run(split_losses, dtype, world=tensor)
    assert [value for value, _ in results] == pytest.approx([total.item()] * tensor, rel=1e-6)
    found = torch.cat([part for _, part in results], dim=-1)
    torch.testing.assert_close(found.double(), logits.grad, rtol=rtol, atol=2e-6)


HIDDEN = 12


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and an output matrix."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(LENGTH, ROWS, HIDDEN, generator=generator)
    return hidden, torch.randn(VOCAB, HIDDEN, generator=generator)


def split_linear(rank, world, chunk, dtype, learns):
    """The loss by chunks, and the gradients of the hidden states and of this rank's rows of the matrix."""
    hidden, weight = (value.to(dtype) for value in factors())
    weight = weight.chunk(world)[rank].clone().requires_grad_(learns)
    hidden.requires_grad_()
    total = smoothed(hidden, labels(), dist.group.WORLD, chunk, weight)
    total.backward()
    return total.item(), hidden.grad, weight.grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-5)])
@pytest.mark.parametrize(("tensor", "chunk"), [(1, 4), (2, 15), (4, 1)])
def test_chunks_of_logits_equal_torch(ranks, tensor, chunk, dtype, tolerance):
    """15 tokens: chunks with a rest, all tokens in one, every token for itself."""
    hidden, weight = (value.to(dtype).double().requires_grad_() for value in factors())
    expected = smoothed_whole(hidden @ weight.t(), labels())
    expected.backward()
    parts = ranks.run(split_linear, chunk, dtype, True, world=tensor)
    for total, found, _ in parts:
        assert total == pytest.approx(expected.item(), rel=tolerance)
        torch.testing.assert_close(found.double(), hidden.grad, rtol=tolerance, atol=tolerance * 10)
    found = torch.cat([part[2] for part in parts])
    torch.testing.assert_close(found.double(), weight.grad, rtol=tolerance, atol=tolerance * 10)


def test_a_frozen_output_matrix_gets_no_gradient(ranks):
    ((_, hidden, weight),) = ranks.run(split_linear, 4, torch.float32, False)
    ((_, expected, _),) = ranks.run(split_linear, 4, torch.float32, True)
    assert weight is None
    assert torch.equal(hidden, expected)


def test_all_tensor_ranks_have_the_same_bits(ranks):
    (first, _), *others = ranks.run(split, "ordinary", torch.float32, world=4)
    for nll, _ in others:
        assert torch.equal(nll, first)


def by_hand(rank, world):
    """Two tokens over a vocabulary of 4 on two ranks: logits (0, ln 2, ln 3, ln 4), labels 0 and 3."""
    logits = torch.tensor([0.0, math.log(2), math.log(3), math.log(4)]).view(1, 1, 4).repeat(2, 1, 1)
    mine = logits[..., 2 * rank : 2 * rank + 2].clone().requires_grad_()
    nll = token_losses(mine, torch.tensor([[0], [3]]), dist.group.WORLD).nll
    nll.sum().backward()
    return nll.flatten().tolist(), mine.grad.squeeze(1).tolist()


def test_values_by_hand(ranks):
    (nll, left), (_, right) = ranks.run(by_hand, world=2)
    # The exponentials are 1, 2, 3, 4 of 10: nll = ln 10 and ln 10 - ln 4; gradient = p - onehot.
    assert nll == pytest.approx([math.log(10), math.log(2.5)], rel=1e-6)
    assert left == [pytest.approx([-0.9, 0.2]), pytest.approx([0.1, 0.2])]
    assert right == [pytest.approx([0.3, 0.4]), pytest.approx([0.3, -0.6])]


def masked_nan(rank, world, expected):
    """A token that counts for nothing has logits that are not finite."""
    logits = torch.zeros(2, 1, 4)
    logits[1] = torch.nan
    logits.requires_grad_()
    nll = token_losses(logits, torch.zeros(2, 1, dtype=torch.long), dist.group.WORLD, expected=expected).nll
    torch.where(torch.tensor([[True], [False]]), nll, 0.0).sum().backward()
    return nll.flatten().tolist(), logits.grad.flatten().tolist()


@pytest.mark.parametrize("expected", [None, torch.tensor(1.0), torch.tensor(0.5)])
def test_a_bad_token_leaves_the_others_alone(ranks, expected):
    ((nll, gradient),) = ranks.run(masked_nan, expected)
    assert nll[0] == pytest.approx(math.log(4))
    assert math.isnan(nll[1])
    assert gradient == pytest.approx([-0.75, 0.25, 0.25, 0.25, 0, 0, 0, 0])
