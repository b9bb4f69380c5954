"""Taps of a parameter that is broadcast over the cases: its own per-case gradients.

The parameter is expanded along the cases by a view, so its consumer's backward returns one
gradient a case before they are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_fx.ops.gram import Statistic
from kfac_fx.ops.kronecker import (
    WHOLE,
    ColumnKroneckerStatistics,
    FactorForm,
    case_covariance,
    form_of,
    gradient_factor,
    over_cases,
)
from kfac_fx.ops.options import TapOptions
from kfac_fx.ops.tap import define_tap, tapped


@dataclass(frozen=True)
class CaseStatistics:
    """(C,): the summed outer product of per-case gradients, or its diagonal.

    C = sum over cases of u u^T, u [P] the gradient of a case with respect to the parameter's P
    entries. docs/explanation/mathematics.md, section 4, "any other parameter".

    Attributes:
        dim: dimensions of C: 2 for the full matrix [P, P], 1 for the diagonal.
        per_case: whether the first dimension of g counts the cases; else the batch is one case.
    """

    dim: int
    per_case: bool

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        """Return (C,); the saved tensors are slopes that g is multiplied by."""
        # What lies between the parameter and the tap works entry by entry, so the chain rule is one
        # product with its slopes. They are the same for all cases.
        cases = g.shape[0] if self.per_case else 1
        u = g.to(dtype).reshape(cases, 1, -1)
        for slope in tensors:
            u = u if slope is None else u * slope.to(dtype).reshape(-1)
        return [case_covariance(u, self.dim)]

    def columns(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        """Return C summed over columns, which are further cases of it."""
        g = g.flatten(0, 1) if self.per_case else g
        return replace(self, per_case=True)(g, tensors, wanted, dtype)


@dataclass(frozen=True)
class CaseOptions(TapOptions):
    """Options of the tap for per-case gradients; it has none."""


@dataclass(frozen=True)
class RowOptions(TapOptions):
    """Options of the tap for a matrix of rows.

    Attributes:
        one_case: whether the whole batch counts as one case, as nothing tells the cases apart.
    """

    one_case: bool


@dataclass(frozen=True)
class RowStatistics(ColumnKroneckerStatistics):
    """(A, G) of rows [T, D], each an embedding that every case looks up once (the expand form).

    Rows count as uncorrelated, so A is the identity, kept as a vector [T]; G = sum over cases and
    rows of g g^T / T, [D, D]. docs/explanation/mathematics.md, section 4, "any other parameter",
    where a full covariance of T D entries is too large.

    Attributes:
        rows: T.
        per_case: whether the first dimension of g counts the cases; else the batch is one case.
        G: how G is kept.
    """

    rows: int
    per_case: bool
    G: FactorForm = WHOLE

    def inputs(self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Statistic:
        """Return the identity's diagonal."""
        # Every case looks up every row once: counts of one.
        return torch.ones(self.rows, dtype=dtype, device=g.device)

    def gradients(
        self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype, *, divide: bool
    ) -> Statistic:
        """Return G over the entries of a row."""
        u = g.to(dtype).reshape(g.shape[0] if self.per_case else 1, self.rows, -1)
        for slope in tensors:
            u = u if slope is None else u * slope.to(dtype).reshape(self.rows, -1)
        return gradient_factor(u, reduce=False, divide=divide, form=self.G)

    def column_gradients(
        self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype, *, divide: bool
    ) -> Statistic:
        """Return G summed over columns, which are further cases of it."""
        g = g.flatten(0, 1) if self.per_case else g
        return replace(self, per_case=True).gradients(g, tensors, dtype, divide=divide)

    def positions(self, g: Tensor, tensors: Sequence[Tensor | None]) -> float:
        """Return T."""
        return self.rows


class _Spread(NamedTuple):
    """A parameter on its way to be tapped.

    Attributes:
        q: the parameter with a copy for each case, where there is one.
        per_case: whether there is.
        slopes: dq/dp, entry by entry, where q was computed from the parameter p; else nothing.
    """

    q: Tensor
    per_case: bool
    slopes: list[Tensor]


def _spread(q: Tensor, tensors: Sequence[Tensor | None]) -> _Spread:
    """Return q over the cases; ``tensors`` are what depends on them, and p, or None each."""
    like, p = tensors
    # The slopes are formed while the graph from p to q is there: autograd frees it in the backward.
    slopes = [] if p is None or not q.requires_grad else [_slope(p, q)]
    if like is None:  # an expansion in the model has made the copies already
        return _Spread(q, True, slopes)
    q, per_case = over_cases(q, like)
    return _Spread(q, per_case, slopes)


def _slope(p: Tensor, q: Tensor) -> Tensor:
    """Return dq/dp, entry by entry, of a q that was computed from p entry by entry."""
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(q.sum(), p, retain_graph=True)
    return slope


def _cases(
    q: Tensor, tensors: Sequence[Tensor | None], factors: Sequence[Tensor], _: CaseOptions
) -> Tensor:
    found = _spread(q, tensors)
    statistics = CaseStatistics(factors[0].dim(), found.per_case)
    return tapped(found.q, statistics, found.slopes, factors)


def _rows(
    q: Tensor,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    options: RowOptions,
) -> Tensor:
    found = _spread(q, tensors)
    A, G = factors[:2]
    per_case = found.per_case and not options.one_case
    return tapped(found.q, RowStatistics(A.shape[0], per_case, form_of(G)), found.slopes, factors)


define_tap("cases", CaseOptions, _cases, tensors=("like?", "p?"), factors=("C",))
define_tap("case_rows", RowOptions, _rows, tensors=("like?", "p?"))
