"""Factors for the outputs' rows of a weight that is computed from a parameter.

Where row o of the weight is W_o = s_o V_o, the gradient of V_o is s_o g_o a^T: the factor A stays
and G becomes that of s * g. The statistic is the gradient of G's buffer, so the buffer passes
through an operator whose backward multiplies by s s^T.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fx.ops.row_factors import row_factors
from kfac_fx.ops.state import is_paused
from kfac_fx.ops.tap import define

Context: TypeAlias = Any
"""What autograd hands from a forward to its backward; attributes are set on it freely."""


class _RowScaled(torch.autograd.Function):
    """A zero of G's shape whose backward multiplies rows and columns by s."""

    @staticmethod
    def forward(G: Tensor, s: Tensor) -> Tensor:
        return G.new_zeros(()).expand(G.shape)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        G, s = inputs
        ctx.save_for_backward(s)
        ctx.G = G

    @staticmethod
    def backward(ctx: Context, statistic: Tensor) -> tuple[Tensor | None, None]:
        if is_paused(ctx.G):
            return None, None
        (s,) = ctx.saved_tensors
        s = s.to(statistic.dtype)
        if s.numel() == statistic.numel() > 1:  # the diagonal of G
            return statistic * s.reshape(statistic.shape).square(), None
        places = statistic.shape[:-1]  # those of sub-blocks may be more than there are rows
        s = F.pad(s, (0, places.numel() - s.numel())).reshape(places)
        return statistic * s.unsqueeze(-1) * s.unsqueeze(-2), None


def _row_scaled(
    G: Tensor, result: Tensor, source: Tensor, rows: list[int], entrywise: bool
) -> Tensor:
    if not G.requires_grad:
        return G
    scaled: Tensor = _RowScaled.apply(G, row_factors(result, source, rows, entrywise).detach())
    return scaled


define(
    "row_scaled(Tensor G, Tensor result, Tensor source, int[] rows, bool entrywise) -> Tensor",
    _row_scaled,
)
