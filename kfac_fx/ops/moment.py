"""Second moments of per-case gradients in given bases (George et al. 2018, EKFAC, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_fx.ops.sides import Side, side_of
from kfac_fx.ops.tap import define, recording, tapped

CHUNK = 2**24
"""Entries of per-case gradients that are formed at a time, where positions share the weight."""


@dataclass(frozen=True)
class MomentStatistics:
    """(S,): sum over cases of (U_G^T DW_n U_A)^2, DW_n the sum over positions of g abar^T."""

    side: Side

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Tensor | None]:
        x, U_A, U_G = tensors
        assert x is not None and U_A is not None and U_G is not None
        a = self.side.inputs(x, self.side.positions(g.shape)).to(dtype)
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1) if self.side.bias else a
        return [projected_moments(a @ U_A, self.side.derivatives(g).to(dtype) @ U_G)]


def projected_moments(a: Tensor, g: Tensor) -> Tensor:
    """sum_n (sum_s g_ns a_ns^T)^2 by entry, of a [N, S, d_in] and g [N, S, d_out]."""
    cases, positions, inputs = a.shape
    outputs = g.shape[-1]
    if positions == 1:
        return g.squeeze(1).square().mT @ a.squeeze(1).square()
    size = max(1, CHUNK // (inputs * outputs))
    total = a.new_zeros(outputs, inputs)
    for start in range(0, cases, size):
        part = slice(start, start + size)
        total += (g[part].mT @ a[part]).square().sum(0)
    return total


def _tap(y: Tensor, x: Tensor, U_A: Tensor, U_G: Tensor, S: Tensor, side: str) -> Tensor:
    if not recording([S]):
        return y
    return tapped(y, MomentStatistics(side_of(side)), [x, U_A, U_G], [S])


define("moment(Tensor y, Tensor x, Tensor U_A, Tensor U_G, Tensor S, str side) -> Tensor", _tap)
