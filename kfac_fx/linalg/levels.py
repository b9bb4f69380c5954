"""Inverses of triangles and their products as a GPU is quick at: few calls, on whole stacks."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_by_levels(L: Tensor) -> Tensor:
    """The inverses of lower triangles [..., d, d].

    Blocks of at most 256 on the diagonals are inverted all at once; then neighbours are joined,
    level by level: the inverse of [[A, 0], [B, C]] is [[A^-1, 0], [-C^-1 B A^-1, C^-1]].
    """
    d, count = L.shape[-1], 1
    while count * 256 < d:
        count *= 2
    width = -(-d // count)
    missing = count * width - d
    if missing:
        L = torch.nn.functional.pad(L, (0, missing, 0, missing))
        torch.diagonal(L, 0, -2, -1)[..., d:].fill_(1.0)
    blocks = on_diagonal(L.unflatten(-1, (count, -1)).unflatten(-3, (count, -1)))
    ones = torch.eye(width, dtype=L.dtype, device=L.device)
    X = torch.linalg.solve_triangular(blocks, ones.expand_as(blocks), upper=False)
    while count > 1:
        grid = L.unflatten(-1, (count, -1)).unflatten(-3, (count, -1))
        B = on_diagonal(grid[..., 1::2, :, 0::2, :])
        A, C = X[..., 0::2, :, :], X[..., 1::2, :, :]
        upper = torch.cat([A, torch.zeros_like(A)], -1)
        X = torch.cat([upper, torch.cat([-(C @ (B @ A)), C], -1)], -2)
        count //= 2
    inverse: Tensor = X[..., 0, :d, :d]
    return inverse


def on_diagonal(grid: Tensor) -> Tensor:
    """[..., k, w, k, w] -> its blocks [..., k, w, w] on the diagonal."""
    return torch.diagonal(grid, 0, -4, -2).movedim(-1, -3)


def equal_parts(d: int, size: int, most: int) -> list[tuple[int, int]]:
    """(start, end) of equal parts of d columns, at most ``most``, and not below ``size`` wide."""
    count = max(1, min(d // size, most))
    return [(d * part // count, d * (part + 1) // count) for part in range(count)]


def product_of_triangles(W: Tensor) -> Tensor:
    """W^T W of lower triangles [..., d, d], by parts of columns: few zeros are multiplied."""
    ranges = equal_parts(W.shape[-1], 512, 4)
    slabs = [W[..., start:, start:end].mT @ W[..., start:, :end] for start, end in ranges]
    lines = [
        torch.cat([slabs[part], *(s[..., start:end].mT for s in slabs[part + 1 :])], -1)
        for part, (start, end) in enumerate(ranges)
    ]
    return torch.cat(lines, -2)
