"""The exponentially growing batches of Martens & Grosse (2015), section 13."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from kfac_fx.errors import UnknownOptionError


class GrowingBatches(Sampler[list[int]]):
    """Batches of m_k = min(m_1 exp((k - 1) / b), cases) random cases; for ``batch_sampler=``.

    Early steps are long and need no exact gradient; late ones are short, and the noise of a small
    batch would be most of them. One pass over the sampler is ``iterations`` batches.

    Args:
        cases: size of the data set |S|.
        iterations: number of batches of a pass.
        first: m_1.
        full_at: the iteration k with m_k = |S|, which fixes b.
        first_iteration: k of the first batch; where a resumed run goes on.
        generator: the generator of the draws; None for torch's global one.

    Raises:
        UnknownOptionError: a number is not positive.
    """

    def __init__(
        self,
        cases: int,
        iterations: int,
        *,
        first: int = 1000,
        full_at: int = 500,
        first_iteration: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        if min(cases, iterations, first, first_iteration) < 1 or full_at < 2:
            raise UnknownOptionError("cases, iterations, first and full_at must be positive")
        self.cases = cases
        self.iterations = iterations
        self.first = min(first, cases)
        self.first_iteration = first_iteration
        self.generator = generator
        self._rate = math.log(cases / self.first) / (full_at - 1)

    def size(self, k: int) -> int:
        """Return m_k, the number of cases of batch k (from 1)."""
        # The exponent is bounded, so that a very late k overflows no float before the minimum.
        return min(round(self.first * math.exp(min((k - 1) * self._rate, 50.0))), self.cases)

    def __len__(self) -> int:
        return self.iterations

    def __iter__(self) -> Iterator[list[int]]:
        for k in range(self.first_iteration, self.first_iteration + self.iterations):
            # Each batch is drawn anew from all cases, not dealt from one permutation: batches that
            # grow have no epochs.
            order = torch.randperm(self.cases, generator=self.generator)
            yield order[: self.size(k)].tolist()
