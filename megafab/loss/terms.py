"""The loss of a micro-batch before it is summed: named terms per token, and token weights.

Shape suffixes: B rows of a micro-batch, L sequence length (the local slice under context parallelism).
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
        mask_BL: 1 where the prediction counts, else 0.
        domain_B: the domain's index of each row.
        log_z_BL: log of the softmax normaliser over the whole vocabulary, with gradient; None where no
            technique says that it changes the loss.
        mean_logit_BL: the mean of the logits over the vocabulary, with gradient; None likewise.
        context_group: the ranks that share a sequence; None for one rank, as for the other group.
        data_group: the ranks with other rows of the same micro-batch, M rows together.
        step_losses_M: the mean nll of every row of the step, in sample order, where it is known beforehand
            (`StepPlan.losses_first`); M is then their number.
        micro_batch: which of the step's this is.
    """

    def __init__(
        self,
        *,
        nll_BL: Tensor,
        mask_BL: Tensor,
        domain_B: Tensor,
        log_z_BL: Tensor | None = None,
        mean_logit_BL: Tensor | None = None,
        context_group: dist.ProcessGroup | None = None,
        data_group: dist.ProcessGroup | None = None,
        step_losses_M: Tensor | None = None,
        micro_batch: int = 0,
    ) -> None:
        self.nll_BL = nll_BL
        self.mask_BL = mask_BL
        self.domain_B = domain_B
        self._log_z_BL, self._mean_logit_BL = log_z_BL, mean_logit_BL
        self._context, self._data = _several(context_group), _several(data_group)
        self._step_losses_M, self._micro_batch = step_losses_M, micro_batch
        self._notes: dict[str, Tensor] = {}
        self._weights_BL: Tensor | None = None
        self._added: dict[str, Tensor] = {}

    @property
    def log_z_BL(self) -> Tensor:
        """log of the softmax normaliser of every token, for a technique that writes `loss_terms`."""
        assert self._log_z_BL is not None, "its technique does not say that it writes loss_terms"
        return self._log_z_BL

    @property
    def mean_logit_BL(self) -> Tensor:
        """The mean logit of every token, for a technique that writes `loss_terms`."""
        assert self._mean_logit_BL is not None, "its technique does not say that it writes loss_terms"
        return self._mean_logit_BL

    def add(self, name: str, value_BL: Tensor) -> None:
        """Adds a named term, one value per token (spread a value per row over its tokens).

        `name` must be among the `terms` its technique declares: the ledger has a row for each.
        """
        assert value_BL.shape == self.nll_BL.shape, (name, value_BL.shape, self.nll_BL.shape)
        assert name != NLL
        assert name not in self._added, f"term {name} is added twice"
        self._added[name] = value_BL

    def note(self, name: str, value_BL: Tensor) -> None:
        """Has the ledger add up values by domain that are no part of the loss.

        `name` must be among the `notes` its technique declares.
        """
        self._notes[name] = value_BL.detach()

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

    def recorded(self) -> Mapping[str, Tensor]:
        """What the ledger adds up: every term and every note."""
        return {**self.values(), **self._notes}

    def row_losses(self) -> Tensor:
        """The mean nll of each whole sequence's valid tokens [B], without gradient; nan if there are none."""
        nll_B = valid(self.nll_BL.detach(), self.mask_BL).sum(1)
        both = torch.stack((nll_B, (self.mask_BL != 0).sum(1).to(nll_B.dtype)))
        if self._context is not None:
            dist.all_reduce(both, group=self._context)
        return both[0] / both[1]

    def population(self) -> tuple[Tensor, Tensor]:
        """The mean nll of all rows that are weighed together [M], and the place of this rank's in it [B].

        They are the rows of this micro-batch on all data ranks, or those of the whole step where its losses
        are known beforehand; in sample order, so that nothing depends on how they are spread over ranks. A
        row without valid tokens is nan.
        """
        rows = len(self.mask_BL)
        data = self._data
        ranks, rank = (1, 0) if data is None else (data.size(), data.rank())
        place_B = torch.arange(rank * rows, (rank + 1) * rows, device=self.mask_BL.device)
        if self._step_losses_M is not None:
            return self._step_losses_M, place_B + self._micro_batch * ranks * rows
        return self.over_data(self.row_losses()), place_B

    def whole_rows(self, *values_BL: Tensor) -> tuple[Tensor, ...]:
        """Values of all positions of the rows [B, S], S in the order of context ranks; without gradient."""
        context, rows = self._context, len(self.mask_BL)
        if context is None:
            return tuple(value.detach() for value in values_BL)
        parts = [gathered(value.detach(), context).view(context.size(), rows, -1) for value in values_BL]
        return tuple(part.transpose(0, 1).flatten(1) for part in parts)

    def over_data(self, value: Tensor) -> Tensor:
        """The values of all data ranks along the first dimension, by rank; without gradient."""
        if self._data is None:
            return value.detach()
        return gathered(value.detach(), self._data)


def gathered(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The values of all ranks along the first dimension, in the order of ranks; a collective."""
    parts = value.new_empty(group.size() * value.shape[0], *value.shape[1:])
    dist.all_gather_into_tensor(parts, value.contiguous(), group=group)
    return parts


def _several(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    return group if group is not None and group.size() > 1 else None


def valid(value_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """`value_BL` where the mask is not 0, else 0; not a product, since 0 * nan is nan."""
    return torch.where(mask_BL != 0, value_BL, 0.0)
