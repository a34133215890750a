"""The loss of a micro-batch before it is summed: named terms per token, and token weights.

Shape suffixes: B rows of a micro-batch, L sequence length (the local slice under context parallelism),
V vocabulary shard of a tensor rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

NLL = "nll"


class LossTerms:
    """What `Technique.on_loss` reads and changes; how it enters the optimised total is said in `loss.ledger`.

    Every value is per token, float32, and the same on all tensor ranks, and so is the total built from
    them. Positions where `mask_BL` is 0 count for nothing, whatever their values are.

    Args:
        nll_BL: negative log-likelihood of each label, with gradient.
        logits_LBV: this tensor rank's shard of the vocabulary, in the model's dtype, with gradient, as they
            were before the cross-entropy.
        mask_BL: 1 where the prediction counts, else 0.
        domain_B: the domain's index of each row.
        tensor_group: the ranks that share the vocabulary; None for one rank.
    """

    def __init__(
        self,
        *,
        nll_BL: Tensor,
        logits_LBV: Tensor,
        mask_BL: Tensor,
        domain_B: Tensor,
        tensor_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.nll_BL = nll_BL
        self.logits_LBV = logits_LBV
        self.mask_BL = mask_BL
        self.domain_B = domain_B
        self._group = tensor_group if tensor_group is not None and tensor_group.size() > 1 else None
        self._weights_BL: Tensor | None = None
        self._added: dict[str, Tensor] = {}

    def add(self, name: str, value_BL: Tensor) -> None:
        """Adds a named term, one value per token (spread a value per row over its tokens).

        `name` must be among the `terms` its technique declares: the ledger has a row for each.
        """
        assert value_BL.shape == self.nll_BL.shape, (name, value_BL.shape, self.nll_BL.shape)
        assert name != NLL
        assert name not in self._added, f"term {name} is added twice"
        self._added[name] = value_BL

    def weigh(self, weight_BL: Tensor) -> None:
        """Multiplies the nll of each token by `weight_BL` (no gradient flows into it); calls multiply."""
        weight_BL = weight_BL.detach()
        self._weights_BL = weight_BL if self._weights_BL is None else self._weights_BL * weight_BL

    def total(self) -> Tensor:
        """This micro-batch's part of the numerator of the optimised total: a scalar with gradient."""
        value_BL = self.nll_BL if self._weights_BL is None else self.nll_BL * self._weights_BL
        for term_BL in self._added.values():
            value_BL = value_BL + term_BL
        return valid(value_BL, self.mask_BL).sum()

    def values(self) -> Mapping[str, Tensor]:
        """Every term `[B, L]` by name, `nll` (unweighted) first."""
        return {NLL: self.nll_BL, **self._added}

    def tensor_sum(self, value: Tensor) -> Tensor:
        """The sum over tensor ranks, with gradient."""
        return value if self._group is None else _TensorSum.apply(value, self._group)

    def tensor_max(self, value: Tensor) -> Tensor:
        """The maximum over tensor ranks, without gradient."""
        value = value.detach()
        if self._group is not None:
            value = value.clone()
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._group)
        return value


def valid(value_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """`value_BL` where the mask is not 0, else 0; not a product, since 0 * nan is nan."""
    return torch.where(mask_BL != 0, value_BL, 0.0)


class _TensorSum(torch.autograd.Function):
    """All-reduce whose backward is the identity: each rank computes the whole total from the sum.

    Adding the gradients up over ranks as well would count that one total once per rank.
    """

    @staticmethod
    def forward(ctx, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        value = value.clone()
        dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None
