"""Products with lower triangular matrices, and their inverses, by parts: zeros are not multiplied.

On a CPU matrix products are faster than LAPACK's triangular solver. On a GPU every part costs a
launch: products take whole matrices, and inverses and their products go as levels.py says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_fx.linalg.levels import equal_parts, inverse_by_levels, product_of_triangles


def column_parts(matrix: Tensor, size: int, most: int) -> list[tuple[int, int]]:
    """``equal_parts`` of a matrix's columns; one on a GPU, and of stacks."""
    whole = matrix.is_cuda or matrix.dim() != 2
    return equal_parts(matrix.shape[-1], size, 1 if whole else most)


def triangular_product(T: Tensor, X: Tensor, *, transposed: bool = False) -> Tensor:
    """T X, or T^T X, of a lower triangle T [n, n] and X [n, m]."""
    ranges = column_parts(T, 96, 4)
    if len(ranges) == 1:
        return T.mT @ X if transposed else T @ X
    if transposed:
        return torch.cat([T[start:, start:end].mT @ X[start:] for start, end in ranges])
    return torch.cat([T[start:end, :end] @ X[:end] for start, end in ranges])


def triangular_inverse(L: Tensor) -> Tensor:
    """The inverse of lower triangles [..., d, d]."""
    if L.is_cuda:
        return inverse_by_levels(L)
    result = torch.zeros_like(L, memory_format=torch.contiguous_format)
    invert_into(result, L)
    return result


def invert_into(result: Tensor, L: Tensor) -> None:
    """``triangular_inverse`` into zeros, by halves.

    The inverse of [[A, 0], [B, C]] is [[A^-1, 0], [-C^-1 B A^-1, C^-1]].
    """
    ranges = column_parts(L, 64, 2)
    if len(ranges) == 1:
        torch.diagonal(result, 0, -2, -1).fill_(1.0)
        result.copy_(torch.linalg.solve_triangular(L, result, upper=False))
        return
    half = ranges[1][0]
    A, C = result[:half, :half], result[half:, half:]
    invert_into(A, L[:half, :half])
    invert_into(C, L[half:, half:])
    CB = triangular_product(C, L[half:, :half])
    result[half:, :half].sub_(triangular_product(A, CB.mT, transposed=True).mT)


def symmetric_product(X: Tensor, *, triangular: bool = False) -> Tensor:
    """X^T X of [n, d]; the blocks above the diagonal are copies of those below it.

    Args:
        triangular: X is a lower triangle.
    """
    if triangular and X.is_cuda:
        return product_of_triangles(X)
    ranges = column_parts(X, 96, 8)
    if len(ranges) == 1 or torch.compiler.is_compiling():  # which refuses results in parts of one
        return X.mT @ X
    result = X.new_empty(X.shape[-1], X.shape[-1])
    for start, end in ranges:
        rows, slab = X[start:] if triangular else X, result[start:end, :end]
        torch.mm(rows[:, start:end].mT, rows[:, :end], out=slab)
        result[:start, start:end] = slab[:, :start].mT
    return result
