"""Cases and positions of a tensor, and second moments over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def case_rows(t: Tensor, features: Sequence[int]) -> Tensor:
    """t as [N, S, features]: cases, positions that share the weight, flattened features.

    Args:
        t: any tensor; the first dimension that is no feature counts the cases.
        features: dimensions of t that hold the features, in order.
    """
    order = [dim % t.dim() for dim in features]
    rest = [dim for dim in range(t.dim()) if dim not in order]
    t = t.permute(rest + order)
    lead = t.shape[: len(rest)]
    cases = lead[0] if rest else 1
    return t.reshape(cases, lead[1:].numel(), t.shape[len(rest) :].numel())


def gram(rows: Tensor) -> Tensor:
    """Sum over rows of the outer product: [..., S, d] -> [..., d, d]."""
    return rows.mT @ rows


def homogeneous_gram(rows: Tensor) -> Tensor:
    """``gram`` of the rows with a 1 appended, without the copy: [..., S, d] -> [..., d+1, d+1]."""
    sums = rows.sum(-2).unsqueeze(-1)
    count = torch.full_like(sums[..., :1, :], rows.shape[-2])
    top = torch.cat([gram(rows), sums], -1)
    bottom = torch.cat([sums.mT, count], -1)
    return torch.cat([top, bottom], -2)


def input_factor(rows: Tensor, *, bias: bool, reduce: bool) -> Tensor:
    """A of curvature.md section 2, from inputs [..., N, S, d].

    expand: sum over cases and positions of abar abar^T / N; reduce: of the mean over positions.
    """
    cases = rows.shape[-3]
    flat = rows.mean(-2) if reduce else rows.flatten(-3, -2)
    return (homogeneous_gram(flat) if bias else gram(flat)) / cases


def gradient_factor(rows: Tensor, *, reduce: bool, divide: bool) -> Tensor:
    """G of curvature.md section 2 times the number of likelihood terms, from g [..., N, S, d].

    expand: sum over cases and positions of g g^T, divided by S unless the positions of several
    uses are counted together; reduce: of the sum over positions.
    """
    if reduce:
        return gram(rows.sum(-2))
    total = gram(rows.flatten(-3, -2))
    return total / rows.shape[-2] if divide else total


def case_covariance(u: Tensor, dim: int) -> Tensor:
    """Sum over cases of the outer product of per-case gradients.

    Args:
        u: [N, K, d]: K gradients (scale and shift, say) of d entries a case.
        dim: dimensions of the factor: 2 for the full [K d, K d] matrix, 3 for [d, K, K], 1 for
            the diagonal [K d].
    """
    if dim == 2:
        return gram(u.flatten(1))
    if dim == 3:
        return torch.einsum("nkd,nld->dkl", u, u)
    return u.flatten(1).square().sum(0)
