"""Taps of a look-up: A is the diagonal of token counts, kept as a vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_fx.ops.gram import Statistic, multiplied
from kfac_fx.ops.kronecker import (
    WHOLE,
    ColumnKroneckerStatistics,
    FactorForm,
    form_of,
    gradient_factor,
    over_cases,
)
from kfac_fx.ops.options import TapOptions
from kfac_fx.ops.tap import define_tap, tapped

NO_PADDING = -(2**31)
"""In place of ``padding_idx`` where there is none; torch counts negative ones from the end."""


@dataclass(frozen=True)
class EmbeddingOptions(TapOptions):
    """Options of a look-up's tap.

    Attributes:
        padding_idx: the token that gets no gradient, counted from the front; or ``NO_PADDING``.
    """

    padding_idx: int


@dataclass(frozen=True)
class EmbeddingStatistics(ColumnKroneckerStatistics):
    """(A, G) of a look-up in a table [V, D]; always in the expand form.

    A one-hot input makes A = sum over cases and positions of a a^T / N a diagonal of counts / N,
    [V]; G = sum over cases and positions of g g^T / S, [D, D]. Padding contributes to neither
    factor and is no position, so S is a mean over the cases. docs/explanation/mathematics.md,
    section 4, "embedding".

    Attributes:
        options: what the tap was called with.
        rows: V.
        G: how G is kept.
    """

    options: EmbeddingOptions
    rows: int
    G: FactorForm = WHOLE

    def inputs(self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Statistic:
        """Return the counts of the tokens, divided by the number of cases."""
        (ids,) = tensors
        assert ids is not None
        # Counting instead of multiplying: the one-hot inputs of a vocabulary would have V entries
        # each, and all of A off the diagonal is zero where a position holds one token.
        zeros = torch.zeros(self.rows, dtype=dtype, device=g.device)
        return zeros.index_add(0, ids.reshape(-1), self._counted(ids, dtype)) / _cases(ids)

    def gradients(
        self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype, *, divide: bool
    ) -> Statistic:
        """Return G over the entries of a row of the table."""
        (ids,) = tensors
        assert ids is not None
        counted = self._counted(ids, dtype)
        # One long line of positions, as their number differs from case to case where there is
        # padding; G is divided by the mean number afterwards.
        rows = g.to(dtype).reshape(-1, counted.shape[0], g.shape[-1]) * counted.unsqueeze(-1)
        G = gradient_factor(rows, reduce=False, divide=False, form=self.G)
        return multiplied(G) / self._positions(ids, dtype) if divide else G

    def column_gradients(
        self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype, *, divide: bool
    ) -> Statistic:
        """Return G summed over columns: each is a line of positions."""
        return self.gradients(g, tensors, dtype, divide=divide)

    def count(self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
        """Return the mean number of tokens of a case, padding left out."""
        (ids,) = tensors
        assert ids is not None
        return self._positions(ids, dtype)

    def _counted(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return 1 for each token and 0 for padding, flattened."""
        return (ids != self.options.padding_idx).to(dtype).reshape(-1)

    def _positions(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the mean number of tokens of a case; 1 in all where there is nothing else."""
        return self._counted(ids, dtype).sum().clamp_min(1.0) / _cases(ids)


def _cases(ids: Tensor) -> int:
    """Return the number of cases; a single id is one."""
    return ids.shape[0] if ids.dim() else 1


def _embedding(
    y: Tensor,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    options: EmbeddingOptions,
) -> Tensor:
    ids, like = tensors
    assert ids is not None
    # Positions, which are the same for all cases, are looked up once: their rows get a copy for
    # each case of what they are added to, and the ids with them.
    if like is not None and (y.dim() != like.dim() or y.shape[0] != like.shape[0]):
        y, _ = over_cases(y, like)
    if y.shape[:-1] != ids.shape:
        missing = y.dim() - 1 - ids.dim()
        ids = ids.reshape((1,) * missing + ids.shape).expand(y.shape[:-1])
    return tapped(y, _statistics(factors, options), [ids], factors)


def _table(
    y: Tensor,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    options: EmbeddingOptions,
) -> Tensor:
    """Tap rows that are the same for all cases: they are the positions of one case."""
    (ids,) = tensors
    assert ids is not None
    return tapped(y, _statistics(factors, options), [ids.unsqueeze(0)], factors)


def _statistics(factors: Sequence[Tensor], options: EmbeddingOptions) -> EmbeddingStatistics:
    A, G = factors[:2]
    return EmbeddingStatistics(options, A.shape[0], form_of(G))


define_tap("embedding", EmbeddingOptions, _embedding, tensors=("ids", "like?"))
define_tap("table_embedding", EmbeddingOptions, _table, tensors=("ids",))
