"""Second moments of per-case gradients in given bases (George et al. 2018, EKFAC, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_fx.ops.options import TapOptions
from kfac_fx.ops.sides import Side, side_of
from kfac_fx.ops.tap import define_tap, tapped

CHUNK = 2**24
"""Entries of per-case gradients that are formed at a time, where positions share the weight."""


@dataclass(frozen=True)
class MomentOptions(TapOptions):
    """Options of the tap of second moments.

    Attributes:
        side: the use's side, as ``kfac_fx.ops.sides.side_text`` writes it.
    """

    side: str


@dataclass(frozen=True)
class MomentStatistics:
    """(S,): sum over cases of (U_G^T DW_n U_A)^2, entry by entry, [d_out, d_in].

    DW_n is the gradient of a case, the sum over positions of g abar^T. In the bases of A and G it
    is nearly uncorrelated, so its second moments replace the products of their eigenvalues.
    docs/explanation/mathematics.md, section 5.

    Attributes:
        side: reads the use's input and derivative.
    """

    side: Side

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Tensor | None]:
        """Return (S,) from the input and both bases; see ``kfac_fx.ops.columns.Statistics``."""
        x, U_A, U_G = tensors
        assert x is not None and U_A is not None and U_G is not None
        a = self._projected(x, U_A, g.shape, dtype)
        return [projected_moments(a, self.side.derivatives(g).to(dtype) @ U_G)]

    def columns(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Tensor | None]:
        """Return S summed over columns; see ``kfac_fx.ops.columns.ColumnStatistics``."""
        x, U_A, U_G = tensors
        assert x is not None and U_A is not None and U_G is not None
        a = self._projected(x, U_A, g.shape[1:], dtype)
        rows = torch.vmap(self.side.derivatives)(g).to(dtype) @ U_G
        if a.shape[1] == 1:  # squares of a case's columns meet the same square of its input
            return [rows.square().sum(0).squeeze(1).mT @ a.squeeze(1).square()]
        return [torch.stack([projected_moments(a, each) for each in rows]).sum(0)]

    def _projected(
        self, x: Tensor, U_A: Tensor, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """Return the inputs of every position in the basis of A, [N, S, d_in].

        Args:
            x: what the tap saved of the forward pass.
            U_A: the basis.
            shape: of a derivative.
            dtype: that products are formed in.
        """
        a = self.side.inputs(x, self.side.positions(shape)).to(dtype)
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1) if self.side.options.bias else a
        return a @ U_A


def projected_moments(a: Tensor, g: Tensor) -> Tensor:
    """Return sum_n (sum_s g_ns a_ns^T)^2 by entry, of a [N, S, d_in] and g [N, S, d_out].

    With one position a case the square of the outer product is the outer product of the squares:
    one matrix product instead of a matrix a case.
    """
    cases, positions, inputs = a.shape
    outputs = g.shape[-1]
    if positions == 1:
        return g.squeeze(1).square().mT @ a.squeeze(1).square()
    # The square is of the sum over positions, so a gradient must be formed for every case; some at
    # a time, as each has as many entries as the weight.
    size = max(1, CHUNK // (inputs * outputs))
    total = a.new_zeros(outputs, inputs)
    for start in range(0, cases, size):
        part = slice(start, start + size)
        total += (g[part].mT @ a[part]).square().sum(0)
    return total


def _record(
    y: Tensor,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    options: MomentOptions,
) -> Tensor:
    return tapped(y, MomentStatistics(side_of(options.side)), tensors, factors)


define_tap("moment", MomentOptions, _record, tensors=("x", "U_A", "U_G"), factors=("S",))
