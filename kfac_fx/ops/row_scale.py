"""Factors for the outputs' rows of a weight that is computed from a parameter.

Where row o of the weight is W_o = s_o V_o, the gradient of V_o is s_o g_o a^T: the factor A stays
and G becomes that of s * g. The statistic is the gradient of G's buffer, so the buffer passes
through an operator whose backward multiplies by s s^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fx.ops.state import is_paused
from kfac_fx.ops.tap import define


def row_factors(result: Tensor, source: Tensor, rows: Sequence[int], entrywise: bool) -> Tensor:
    """s, one number for each row of a parameter ``source`` that ``result`` is computed from.

    Args:
        result: of source's shape; with its graph where ``entrywise``.
        rows: dimensions that count the rows, in order.
        entrywise: s is the root mean square of the row's slopes that are not zero. Else it is the
            least-squares slope of the row's entries against the parameter's, with an intercept:
            g / |v| of a weight normalised to the length g, gain / deviation of a standardised one.
    """
    others = [dim for dim in range(source.dim()) if dim not in rows]

    def flat(t: Tensor) -> Tensor:
        t = t.permute(*rows, *others)
        return t.reshape(t.shape[: len(rows)].numel(), -1)

    if entrywise and result.requires_grad:
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(result.sum(), source, retain_graph=True)
        slope = flat(slope)
        count = (slope != 0).sum(1).clamp_min(1)
        return slope.sum(1).sign() * (slope.square().sum(1) / count).sqrt()
    x, y = flat(source.detach()), flat(result.detach())
    x = x - x.mean(1, keepdim=True)
    return (x * y).sum(1) / x.square().sum(1).clamp_min(torch.finfo(x.dtype).tiny)


class _RowScaled(torch.autograd.Function):
    """A zero of G's shape whose backward multiplies rows and columns by s."""

    @staticmethod
    def forward(G: Tensor, s: Tensor) -> Tensor:
        return G.new_zeros(()).expand(G.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        G, s = inputs
        ctx.save_for_backward(s)
        ctx.G = G

    @staticmethod
    def backward(ctx: Any, statistic: Tensor) -> tuple[Tensor | None, None]:
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
