"""One factor for each row of a weight that is computed from a parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def row_factors(result: Tensor, source: Tensor, rows: Sequence[int], entrywise: bool) -> Tensor:
    """Return s, one number for each row of a parameter that a weight is computed from.

    Args:
        result: the weight, in the parameter's shape; with its graph where ``entrywise``.
        source: the parameter.
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
