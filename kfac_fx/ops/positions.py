"""Cases and positions of a tensor, and second moments over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from kfac_fx.ops.gram import Rows, Statistic, cut_gram, homogeneous_gram, second_moment, stay


def case_rows(t: Tensor, features: Sequence[int], groups: Sequence[int] = ()) -> Tensor:
    """t as [N, S, features]: cases, positions that share the weight, flattened features.

    Args:
        t: any tensor; the first dimension that is neither feature nor group counts the cases.
        features: dimensions of t that hold the features, in order.
        groups: dimensions that count independent matrices; where there are any, they are flattened
            to a first dimension of the result.
    """
    if len(features) == 1 and not groups and t.dim() > 1 and features[0] % t.dim() == t.dim() - 1:
        return t.reshape(t.shape[0], -1, t.shape[-1])  # most uses, in one call
    last, first = ([dim % t.dim() for dim in dims] for dims in (features, groups))
    rest = [dim for dim in range(t.dim()) if dim not in last and dim not in first]
    t = t.permute(first + rest + last)
    split = len(first), len(first) + len(rest)
    lead = t.shape[split[0] : split[1]]
    sizes = (lead[0] if rest else 1, lead[1:].numel(), t.shape[split[1] :].numel())
    return t.reshape(t.shape[: split[0]].numel(), *sizes) if first else t.reshape(sizes)


def input_factor(
    rows: Tensor,
    *,
    bias: bool,
    reduce: bool,
    diagonal: bool = False,
    cut: int = 1,
    one: float = 1.0,
) -> Statistic:
    """A of docs/explanation/mathematics.md, section 2, from inputs [..., N, S, d].

    expand: sum over cases and positions of abar abar^T / N; reduce: of the mean over positions.

    Args:
        cut: number of sub-blocks that are kept.
        one: the homogeneous coordinate.
    """
    cases = rows.shape[-3]
    flat = rows.mean(-2) if reduce else rows.flatten(-3, -2)
    if cut > 1:
        flat = torch.cat([flat, torch.full_like(flat[..., :1], one)], -1) if bias else flat
        return cut_gram(flat, cut) / cases
    if diagonal:
        squares = flat.square().sum(-2)
        if bias:
            ones = torch.full_like(squares[..., :1], one * flat.shape[-2])
            squares = torch.cat([squares, ones], -1)
        return squares / cases
    if not bias:
        return second_moment(flat, 1 / cases)
    if stay(flat):
        return Rows(pad(flat, (0, 1), value=one), 1 / cases)
    return homogeneous_gram(flat, 1 / cases, one)


def gradient_factor(
    rows: Tensor, *, reduce: bool, divide: bool, diagonal: bool = False, cut: int = 1
) -> Statistic:
    """G of docs/explanation/mathematics.md, section 2, times the number of terms.

    g is [..., N, S, d].

    expand: sum over cases and positions of g g^T, divided by S unless the positions of several
    uses are counted together; reduce: of the sum over positions.

    Args:
        cut: number of sub-blocks that are kept.
    """
    flat = rows.sum(-2) if reduce else rows.flatten(-3, -2)
    scale = 1 / rows.shape[-2] if divide and not reduce else 1.0
    if cut > 1:
        return cut_gram(flat, cut) * scale
    return flat.square().sum(-2) * scale if diagonal else second_moment(flat, scale)


def case_covariance(u: Tensor, dim: int) -> Statistic:
    """Sum over cases of the outer product of per-case gradients.

    Args:
        u: [N, K, d]: K gradients (scale and shift, say) of d entries a case.
        dim: dimensions of the factor: 2 for the full [K d, K d] matrix, 3 for [d, K, K], 1 for
            the diagonal [K d].
    """
    if dim == 2:
        return second_moment(u.flatten(1))
    if dim == 3:
        return torch.einsum("nkd,nld->dkl", u, u)
    return u.flatten(1).square().sum(0)
