"""Statistics of a parameter that is broadcast over the cases: its own per-case gradients.

The parameter is expanded along the cases by a view, so its consumer's backward returns one
gradient a case before they are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_fx.ops.gram import Statistic
from kfac_fx.ops.positions import case_covariance, gradient_factor
from kfac_fx.ops.tap import define, recording, tapped


@dataclass(frozen=True)
class CaseStatistics:
    """(C,): the summed outer product (or its diagonal) of per-case gradients.

    ``per_case``: whether the first dimension counts the cases; else the whole batch is one case.
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
        cases = g.shape[0] if self.per_case else 1
        u = g.to(dtype).reshape(cases, 1, -1)
        for slope in tensors:
            u = u if slope is None else u * slope.to(dtype).reshape(-1)
        return [case_covariance(u, self.dim)]


@dataclass(frozen=True)
class RowStatistics:
    """(A, G) of rows [T, D], each an embedding that every case looks up once (the expand form).

    A is the identity, kept as a vector; G = sum over cases and rows of g g^T / T, or without the
    division and with T where the positions of several uses are counted.
    """

    rows: int
    per_case: bool
    diagonal: bool

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        u = g.to(dtype).reshape(g.shape[0] if self.per_case else 1, self.rows, -1)
        for slope in tensors:
            u = u if slope is None else u * slope.to(dtype).reshape(self.rows, -1)
        A = torch.ones(self.rows, dtype=dtype, device=g.device)
        one_use = len(wanted) == 2
        G = gradient_factor(u, reduce=False, divide=one_use, diagonal=self.diagonal)
        count = [] if one_use else [torch.full_like(A[0], self.rows)]
        return [A, G, *count]


def over_cases(p: Tensor, like: Tensor) -> tuple[Tensor, bool]:
    """p viewed with one copy for each case of ``like``, and whether it is broadcast over them."""
    missing = like.dim() - p.dim()
    if missing > 0:
        lead = (like.shape[0],) + (1,) * (missing - 1)
        return p.expand(*lead, *p.shape), True
    if missing == 0 and p.dim() > 0 and p.shape[0] == 1:
        return p.expand(like.shape[0], *p.shape[1:]), True
    return p, False


def _slope(p: Tensor, q: Tensor) -> Tensor:
    """dq/dp, entry by entry, of a q that was computed from p entry by entry."""
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(q.sum(), p, retain_graph=True)
    return slope


def _tap(q: Tensor, like: Tensor | None, p: Tensor | None, C: Tensor) -> Tensor:
    if not recording([C]):
        return q
    q, per_case, slopes = _spread(q, like, p)
    return tapped(q, CaseStatistics(C.dim(), per_case), slopes, [C])


def _row_tap(
    q: Tensor,
    like: Tensor | None,
    p: Tensor | None,
    A: Tensor,
    G: Tensor,
    positions: Tensor | None,
    one_case: bool,
) -> Tensor:
    factors = [A, G] if positions is None else [A, G, positions]
    if not recording(factors):
        return q
    q, per_case, slopes = _spread(q, like, p)
    statistics = RowStatistics(A.shape[0], per_case and not one_case, G.dim() == 1)
    return tapped(q, statistics, slopes, factors)


def _spread(q: Tensor, like: Tensor | None, p: Tensor | None) -> tuple[Tensor, bool, list[Tensor]]:
    """q with a copy for each case, whether it has one, and the slopes dq/dp."""
    slopes = [] if p is None or not q.requires_grad else [_slope(p, q)]
    q, per_case = (q, True) if like is None else over_cases(q, like)
    return q, per_case, slopes


define("cases(Tensor q, Tensor? like, Tensor? p, Tensor C) -> Tensor", _tap)
define(
    "case_rows(Tensor q, Tensor? like, Tensor? p, Tensor A, Tensor G, Tensor? positions, "
    "bool one_case) -> Tensor",
    _row_tap,
)
