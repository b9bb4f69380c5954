"""Cases and positions of a tensor, and second moments over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


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


SLABS = 8
"""Into how many slabs a large symmetric product is cut: 9/16 of its multiply-adds remain."""

NARROWEST = {"cpu": 64, "cuda": 512}
"""Features that a slab has at least: below, calls cost more than the multiply-adds they save.

Of fewer than four times as many rows, the copies of the other half do.
"""


def gram(rows: Tensor, scale: float = 1.0) -> Tensor:
    """``scale`` times the sum over rows of the outer product: [..., S, d] -> [..., d, d]."""
    if rows.dim() == 3 and len(rows) == 1:
        return gram(rows[0], scale).unsqueeze(0)
    ranges = _slabs(rows) if rows.dim() == 2 else []
    if len(ranges) < 2:
        return _product(rows.mT, rows, scale)
    slabs = [_product(rows[:, a:b].mT, rows[:, a:], scale) for a, b in ranges]
    return _mirrored(slabs, ranges)


def _mirrored(slabs: Sequence[Tensor], ranges: Sequence[tuple[int, int]]) -> Tensor:
    """[d, d] from its rows by ranges, each from the diagonal on."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        # As a function: what lies left of a slab is the transpose of those above it.
        lines = []
        for start, end in ranges:
            above = zip(slabs, ranges, strict=True)
            left = [slab[:, start - a : end - a].mT for slab, (a, b) in above if b <= start]
            lines.append(torch.cat([*left, slabs[len(left)]], 1))
        return torch.cat(lines)
    result = slabs[0].new_empty(slabs[0].shape[1], slabs[0].shape[1])
    for slab, (start, end) in zip(slabs, ranges, strict=True):
        result[start:end, start:] = slab
        result[end:, start:end] = slab[:, end - start :].mT
    return result


def _slabs(rows: Tensor) -> list[tuple[int, int]]:
    """Ranges of features, by multiples of 16, that a symmetric product is formed by."""
    count, d = rows.shape
    narrowest = NARROWEST.get(rows.device.type, d)
    if count < 4 * narrowest or d < 2 * narrowest:
        return [(0, d)]
    width = max(narrowest, -(-d // SLABS) + 15 & ~15)
    return [(start, min(start + width, d)) for start in range(0, d, width)]


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right, scaled inside the product."""
    if scale == 1.0:
        return left @ right
    if left.dim() == 2:
        return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)
    return left @ right * scale


def homogeneous_gram(rows: Tensor, scale: float = 1.0, one: float = 1.0) -> Tensor:
    """``gram`` of the rows with a 1 appended: [..., S, d] -> [..., d+1, d+1].

    Args:
        one: what is appended; tangents have no constant, so 0.
    """
    if rows.shape[-2] < rows.shape[-1]:  # the rows are the smaller copy
        return gram(torch.nn.functional.pad(rows, (0, 1), value=one), scale)
    first = rows.sum(-2) * (one * scale)
    return bordered(gram(rows, scale), first, rows.shape[-2] * one**2 * scale)


def bordered(second: Tensor, first: Tensor, count: float) -> Tensor:
    """The Gram matrix of homogeneous rows, from the sums of r r^T and of r and their number."""
    last = torch.nn.functional.pad(first, (0, 1), value=count).unsqueeze(-2)
    return torch.cat([torch.cat([second, first.unsqueeze(-1)], -1), last], -2)


def cut_gram(rows: Tensor, count: int) -> Tensor:
    """``gram`` of ``count`` equal parts of the features, the last filled up with zeros.

    [..., S, d] -> [..., count, b, b] with b = ceil(d / count).
    """
    size = -(-rows.shape[-1] // count)
    rows = torch.nn.functional.pad(rows, (0, count * size - rows.shape[-1]))
    return gram(rows.unflatten(-1, (count, size)).movedim(-2, -3))


def input_factor(
    rows: Tensor,
    *,
    bias: bool,
    reduce: bool,
    diagonal: bool = False,
    cut: int = 1,
    one: float = 1.0,
) -> Tensor:
    """A of curvature.md section 2, from inputs [..., N, S, d].

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
    return homogeneous_gram(flat, 1 / cases, one) if bias else gram(flat, 1 / cases)


def gradient_factor(
    rows: Tensor, *, reduce: bool, divide: bool, diagonal: bool = False, cut: int = 1
) -> Tensor:
    """G of curvature.md section 2 times the number of likelihood terms, from g [..., N, S, d].

    expand: sum over cases and positions of g g^T, divided by S unless the positions of several
    uses are counted together; reduce: of the sum over positions.

    Args:
        cut: number of sub-blocks that are kept.
    """
    flat = rows.sum(-2) if reduce else rows.flatten(-3, -2)
    scale = 1 / rows.shape[-2] if divide and not reduce else 1.0
    if cut > 1:
        return cut_gram(flat, cut) * scale
    return flat.square().sum(-2) * scale if diagonal else gram(flat, scale)


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
