"""What a step's losses were, by term and domain, and the one reduction rule.

The rule. A step minimises

    total = (sum over tokens of weight * nll  +  sum over tokens of every named term) / global_tokens

where the sums run over all valid tokens of all micro-batches on all data and context ranks, and
`global_tokens` is their count over the whole step, known before the first forward. A micro-batch gives its
part of the numerator (`LossTerms.total`), the engine divides by `global_tokens`; so gradients are *added*
over micro-batches, data ranks and context ranks, never averaged, and the result does not depend on how the
batch is cut.

What is reported is kept apart from what is optimised. `LossLedger` adds up values per domain in float64
copies: Megatron divides the loss it is given in place, and an alias would be divided with it. The term `nll`
is always the plain, unweighted negative log-likelihood; the other terms are recorded as they enter the total.

Shape suffixes: B rows of a micro-batch, L sequence length (the local slice under context parallelism),
D domains, T terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megafab.loss.terms import NLL, LossTerms, valid


class LossLedger:
    """Sums per term and domain and token counts, in one small device tensor: one reduction, no sync.

    Accumulate with `record` or `add`, join with `merge`, read with `reduced`. Until then nothing waits for
    the device. Sums are float64, because float32 loses single tokens above 16 million; they are taken in a
    fixed order, so that equal inputs give equal bits.

    Args:
        domains: names, in the order of `Batch.domain_B`.
        terms: the names of the terms beside `nll`, and of notes.
        device: where the sums live.
        sum_ranks: adds a tensor up over the job, in place. A token must count on exactly one of the ranks it
            adds up: the engine records on one tensor rank of the last pipeline stage.
    """

    def __init__(
        self,
        domains: Sequence[str],
        terms: Sequence[str],
        *,
        device: torch.device,
        sum_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        self._domains = tuple(domains)
        self._rows = {name: 1 + row for row, name in enumerate((NLL, *terms))}
        self._sum_ranks = sum_ranks
        # Row 0 has the token counts, the other rows the sums of a term: [1 + T, D].
        self._sums = torch.zeros(1 + len(self._rows), len(self._domains), dtype=torch.float64, device=device)
        self._index_D = torch.arange(len(self._domains), device=device)
        self._report: LedgerReport | None = None

    def record(self, terms: LossTerms) -> None:
        """Adds a micro-batch: tokens, terms and notes. Copies: later in-place changes do not reach it."""
        self._tally(0, terms.mask_BL != 0, terms.domain_B)
        for name, value_BL in terms.recorded().items():
            self.add(name, value_BL, terms.mask_BL, terms.domain_B)

    def add(self, name: str, value_BL: Tensor, mask_BL: Tensor, domain_B: Tensor) -> None:
        """Adds the values of one term where the mask is not 0, without counting tokens (`record` does)."""
        assert name in self._rows, f"term {name} was not declared; declared: {', '.join(self._rows)}"
        self._tally(self._rows[name], valid(value_BL.detach(), mask_BL), domain_B)

    def merge(self, other: LossLedger) -> None:
        """Adds the sums of another ledger of the same domains and terms."""
        assert (self._domains, self._rows) == (other._domains, other._rows)
        self._sums += other._sums
        self._report = None

    def reduced(self) -> LedgerReport:
        """The sums over the whole job as plain numbers: one collective and one wait for the device.

        A collective: every rank calls it, or none. The first call's answer is kept, so that loop and
        techniques share it.
        """
        if self._report is None:
            sums = self._sum_ranks(self._sums.clone()).tolist()
            by_domain = [dict(zip(self._domains, row, strict=True)) for row in sums]
            self._report = LedgerReport(
                tokens=by_domain[0], sums={name: by_domain[row] for name, row in self._rows.items()}
            )
        return self._report

    def _tally(self, row: int, value_BL: Tensor, domain_B: Tensor) -> None:
        value_B = value_BL.to(torch.float64).sum(1)
        # A select and not a product with a one-hot matrix: one domain's nan must stay its own. And not
        # index_add, which adds in any order on an accelerator.
        mine_DB = self._index_D[:, None] == domain_B[None, :]
        self._sums[row] += torch.where(mine_DB, value_B[None, :], 0.0).sum(1)
        self._report = None


@dataclass(frozen=True, slots=True)
class LedgerReport:
    """The ledger over the whole job, as plain numbers.

    `tokens` is the count of valid tokens by domain, `sums` the sum of each term by domain.
    """

    tokens: Mapping[str, float]
    sums: Mapping[str, Mapping[str, float]]

    @property
    def loss(self) -> float:
        """Mean unweighted nll over all valid tokens, in nats; nan if there were none."""
        return self.term(NLL)

    @property
    def domain_loss(self) -> dict[str, float]:
        """Mean unweighted nll of each domain that had tokens."""
        nll = self.sums[NLL]
        return {name: nll[name] / count for name, count in self.tokens.items() if count > 0}

    def term(self, name: str) -> float:
        """Mean of a term over all valid tokens; nan if there were none."""
        tokens = sum(self.tokens.values())
        return math.fsum(self.sums[name].values()) / tokens if tokens else math.nan

    @property
    def terms(self) -> dict[str, float]:
        """Mean of every term beside the nll, by name."""
        return {name: self.term(name) for name in self.sums if name != NLL}
