"""Sums of outer products: one half is multiplied, the other half copied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from kfac_fx.ops.library import LIBRARY
from kfac_fx.ops.modes import functional, traced

MOST_SLABS = {"cpu": 16, "cuda": 9}
"""Into how many slabs a large symmetric product is cut: of 16, 17/32 of its multiply-adds remain.
"""

NARROWEST = {"cpu": 64, "cuda": 256}
"""Features that a slab has at least, for each thread of a CPU: narrower ones multiply slowly.

Twice as many where rows are few, or in half precision, and copies cost more beside the products.
"""

SMALL = 2**15
"""Entries of rows whose copy costs less than a call."""

Range = tuple[int, int]


def gram(rows: Tensor, scale: float = 1.0) -> Tensor:
    """``scale`` times the sum over rows of the outer product: [..., S, d] -> [..., d, d]."""
    if rows.dim() == 3 and len(rows) == 1:
        return gram(rows[0], scale).unsqueeze(0)
    ranges = _slabs(rows)
    if len(ranges) < 2:
        return _product(rows.mT, rows, scale)
    if _opaque(rows):
        product: Tensor = torch.ops.kfac_fx.gram.default(rows, scale)
        return product
    if functional(rows):
        slabs = [_product(rows[:, a:b].mT, rows[:, a:], scale) for a, b in ranges]
        return _assembled(slabs, ranges)
    return _written(rows, scale)


def homogeneous_gram(rows: Tensor, scale: float = 1.0, one: float = 1.0) -> Tensor:
    """``gram`` of the rows with a 1 appended: [..., S, d] -> [..., d+1, d+1].

    Args:
        one: what is appended; tangents have no constant, so 0.
    """
    count, d = rows.shape[-2:]
    if _opaque(rows) and len(_slabs(rows)) > 1:
        product: Tensor = torch.ops.kfac_fx.gram.default(rows, scale, one)
        return product
    low = rows.element_size() < 4
    if rows.dim() == 2 and rows.numel() > SMALL and not functional(rows) and not low:
        return _written(rows, scale, one)
    # Where rows are the smaller copy, or few calls count.
    if low or count < d or rows.numel() <= SMALL:
        return gram(pad(rows, (0, 1), value=one), scale)
    return bordered(gram(rows, scale), rows.sum(-2) * (one * scale), count * one**2 * scale)


def bordered(second: Tensor, first: Tensor, count: float) -> Tensor:
    """The Gram matrix of homogeneous rows, from the sums of r r^T and of r and their number."""
    last = pad(first, (0, 1), value=count).unsqueeze(-2)
    return torch.cat([torch.cat([second, first.unsqueeze(-1)], -1), last], -2)


def cut_gram(rows: Tensor, count: int) -> Tensor:
    """``gram`` of ``count`` equal parts of the features, the last filled up with zeros.

    [..., S, d] -> [..., count, b, b] with b = ceil(d / count).
    """
    size = -(-rows.shape[-1] // count)
    rows = pad(rows, (0, count * size - rows.shape[-1]))
    return gram(rows.unflatten(-1, (count, size)).movedim(-2, -3))


def _opaque(rows: Tensor) -> bool:
    """Whether a compiler is given one call: it cannot write slabs where they stay."""
    return traced() and rows.device.type == "cpu"


def _slabs(rows: Tensor) -> list[Range]:
    """Ranges of features, by multiples of 16, that a symmetric product is formed by."""
    count, d = rows.shape[-2:]
    kind = rows.device.type
    width = NARROWEST.get(kind, d) * (torch.get_num_threads() if kind == "cpu" else 1)
    width *= max(1, 4 // rows.element_size())
    width = width if count >= 8 * width else 2 * width
    if rows.dim() > 2 or count < width or d < 2 * width:
        return [(0, d)]
    width = max(width, -(-d // MOST_SLABS[kind]) + 15 & ~15)
    return [(start, min(start + width, d)) for start in range(0, d, width)]


def _fill(result: Tensor, rows: Tensor, scale: float, ranges: Sequence[Range]) -> None:
    """``gram`` into a matrix, or a part of one: each slab from the diagonal on, and mirrored."""
    for start, end in ranges:
        slab = result[start:end, start:]
        torch.addmm(slab, rows[:, start:end].mT, rows[:, start:], beta=0, alpha=scale, out=slab)
        if end < len(result):
            result[end:, start:end] = slab[:, end - start :].mT


def _written(rows: Tensor, scale: float, one: float | None = None) -> Tensor:
    """``gram``, or with ``one`` ``homogeneous_gram``, of [S, d], written where it stays."""
    count, d = rows.shape
    side = d + (one is not None)
    result = rows.new_empty(side, side)
    _fill(result[:d, :d], rows, scale, _slabs(rows))
    if one is not None:
        torch.sum(rows, 0, out=result[d, :d]).mul_(one * scale)
        result[d, d].fill_(count * one**2 * scale)  # a number assigned would wait for a GPU
        result[:d, d] = result[d, :d]
    return result


def _assembled(slabs: Sequence[Tensor], ranges: Sequence[Range]) -> Tensor:
    """[d, d] from its slabs as a function: what lies left of one is the transpose of the others."""
    lines = []
    for start, end in ranges:
        above = zip(slabs, ranges, strict=True)
        left = [slab[:, start - a : end - a].mT for slab, (a, b) in above if b <= start]
        lines.append(torch.cat([*left, slabs[len(left)]], 1))
    return torch.cat(lines)


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right, scaled inside the product."""
    if scale == 1.0:
        return left @ right
    if left.dim() == 2:
        return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)
    return left @ right * scale


def _shape(rows: Tensor, scale: float, one: float | None = None) -> Tensor:
    side = rows.shape[1] + int(one is not None)  # the shape may be symbolic
    return rows.new_empty(side, side)


LIBRARY.define("gram(Tensor rows, float scale, float? one=None) -> Tensor")
LIBRARY.impl("gram", _written, "CPU")
torch.library.register_fake("kfac_fx::gram", _shape, lib=LIBRARY)
