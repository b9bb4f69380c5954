"""Statistics of a parameter that is broadcast over the cases: its own per-case gradients.

The parameter is expanded along the cases by a view, so its consumer's backward returns one
gradient a case before they are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_fx.ops.positions import case_covariance
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
    ) -> list[Tensor | None]:
        cases = g.shape[0] if self.per_case else 1
        return [case_covariance(g.to(dtype).reshape(cases, 1, -1), self.dim)]


def over_cases(p: Tensor, like: Tensor) -> tuple[Tensor, bool]:
    """p viewed with one copy for each case of ``like``, and whether it is broadcast over them."""
    missing = like.dim() - p.dim()
    if missing > 0:
        lead = (like.shape[0],) + (1,) * (missing - 1)
        return p.expand(*lead, *p.shape), True
    if missing == 0 and p.dim() > 0 and p.shape[0] == 1:
        return p.expand(like.shape[0], *p.shape[1:]), True
    return p, False


def _tap(p: Tensor, like: Tensor | None, C: Tensor) -> Tensor:
    if not recording([C]):
        return p
    p, per_case = (p, True) if like is None else over_cases(p, like)
    return tapped(p, CaseStatistics(C.dim(), per_case), [], [C])


define("cases(Tensor p, Tensor? like, Tensor C) -> Tensor", _tap)
