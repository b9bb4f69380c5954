"""Symmetric positive definite matrices: damp them, and invert them by their Cholesky roots.

Programs run these functions, and programs that are saved carry their text: they use torch alone.

On a CPU matrix products are faster than LAPACK's triangular solver, so products with triangles and
their inverses go by parts, and zeros are not multiplied. On a GPU every part costs a launch: there,
and for stacks, products take whole matrices, and inverses go by levels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Damping: docs/explanation/mathematics.md, section 5.


def damped(matrix: Tensor, amount: Tensor) -> Tensor:
    """Return matrix + amount * I, over leading batch dimensions: [..., d, d] and [...]."""
    diagonal = torch.diagonal(matrix, 0, -2, -1)
    return torch.diagonal_scatter(matrix, diagonal + amount.unsqueeze(-1), 0, -2, -1)


def mean_eigenvalue(matrix: Tensor, *, diagonal: bool = False, cut: int = 0) -> Tensor:
    """Return tr(matrix) / dim: [..., d, d] (or its diagonal [..., d]) -> [...].

    Args:
        matrix: symmetric, over leading batch dimensions.
        diagonal: whether it is kept as a vector.
        cut: the dimension of a matrix that is kept as sub-blocks [..., k, b, b], else 0. The zeros
            that fill up the last sub-block must not count as eigenvalues.
    """
    if cut:
        return torch.diagonal(matrix, 0, -2, -1).sum((-2, -1)) / cut
    return (matrix if diagonal else torch.diagonal(matrix, 0, -2, -1)).mean(-1)


def factored_amounts(
    A: Tensor,
    G: Tensor,
    gamma: Tensor | float,
    *,
    diagonal: tuple[bool, bool] = (False, False),
    cut: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor, Tensor]:
    """Return pi and what factored Tikhonov damping adds to A and to G: pi gamma and gamma / pi.

    pi = sqrt((tr A / dim A) / (tr G / dim G)) makes the cross terms of the damped product, which
    lambda I has not, as small as can be in the trace norm (Martens & Grosse 2015, section 6.3).
    Where one of the traces is zero (dead units, a gradient that vanishes) pi is 1: the ratio says
    nothing, and 0 or infinity would leave one of the sides undamped.

    Args:
        A, G: factors [..., a, a] and [..., g, g]; the result is [...].
        gamma: the square root of the damping lambda.
        diagonal, cut: of A and of G, see ``mean_eigenvalue``.
    """
    a = mean_eigenvalue(A, diagonal=diagonal[0], cut=cut[0])
    g = mean_eigenvalue(G, diagonal=diagonal[1], cut=cut[1])
    pi = torch.where((a > 0) & (g > 0), torch.sqrt(a) / torch.sqrt(g), 1.0)
    return pi, pi * gamma, gamma / pi


def damped_factors(
    A: Tensor,
    G: Tensor,
    gamma: Tensor | float,
    *,
    diagonal: tuple[bool, bool] = (False, False),
    cut: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor]:
    """Return A + pi gamma I and G + gamma / pi I; a diagonal stays a vector.

    Args:
        A, G, gamma, diagonal, cut: see ``factored_amounts``. The zeros that fill up sub-blocks
            are damped too, which keeps their Cholesky roots.
    """
    _, for_A, for_G = factored_amounts(A, G, gamma, diagonal=diagonal, cut=cut)
    return (
        A + for_A.unsqueeze(-1) if diagonal[0] else damped(A, for_A),
        G + for_G.unsqueeze(-1) if diagonal[1] else damped(G, for_G),
    )


# Products with triangles.


def equal_parts(d: int, size: int, most: int) -> list[tuple[int, int]]:
    """Return (start, end) of at most ``most`` equal parts of d columns, at least ``size`` wide."""
    count = max(1, min(d // size, most))
    return [(d * part // count, d * (part + 1) // count) for part in range(count)]


def column_parts(matrix: Tensor, size: int, most: int) -> list[tuple[int, int]]:
    """Return ``equal_parts`` of a matrix's columns; one part on a GPU, and of stacks."""
    whole = matrix.is_cuda or matrix.dim() != 2
    return equal_parts(matrix.shape[-1], size, 1 if whole else most)


def triangular_product(T: Tensor, X: Tensor, *, transposed: bool = False) -> Tensor:
    """Return T X, or T^T X, of a lower triangle T [n, n] and X [n, m]."""
    ranges = column_parts(T, 96, 4)
    if len(ranges) == 1:
        return T.mT @ X if transposed else T @ X
    if transposed:
        return torch.cat([T[start:, start:end].mT @ X[start:] for start, end in ranges])
    return torch.cat([T[start:end, :end] @ X[:end] for start, end in ranges])


def symmetric_product(X: Tensor, *, triangular: bool = False) -> Tensor:
    """Return X^T X of X [n, d], exactly symmetric: one triangle is a copy of the other.

    Args:
        X: any matrix, on a GPU also stacks [..., n, d].
        triangular: whether X is a lower triangle, whose zeros need not be multiplied.
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


def product_of_triangles(W: Tensor) -> Tensor:
    """Return W^T W of lower triangles [..., d, d], by parts: few zeros are multiplied."""
    ranges = equal_parts(W.shape[-1], 512, 4)
    slabs = [W[..., start:, start:end].mT @ W[..., start:, :end] for start, end in ranges]
    lines = [
        torch.cat([slabs[part], *(s[..., start:end].mT for s in slabs[part + 1 :])], -1)
        for part, (start, end) in enumerate(ranges)
    ]
    return torch.cat(lines, -2)


# Inverses of triangles.


def triangular_inverse(L: Tensor) -> Tensor:
    """Return the inverse of lower triangles [..., d, d]."""
    if L.is_cuda:
        return inverse_by_levels(L)
    result = torch.zeros_like(L, memory_format=torch.contiguous_format)
    invert_into(result, L)
    return result


def invert_into(result: Tensor, L: Tensor) -> None:
    """Write ``triangular_inverse`` of L into zeros, by halves.

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


def inverse_by_levels(L: Tensor) -> Tensor:
    """Return the inverses of lower triangles [..., d, d] in few calls on whole stacks, for a GPU.

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
    """Return the blocks [..., k, w, w] on the diagonal of [..., k, w, k, w]."""
    return torch.diagonal(grid, 0, -4, -2).movedim(-1, -3)


# Inverses of positive matrices.


def _root_on_gpu(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lower Cholesky root, and flags that are not zero where there is none."""
    d = matrix.shape[-1]
    if matrix.dim() == 3 and d >= 2048 and len(matrix) <= 8:
        # Few large ones: their stack takes up to twice as long as all in turn.
        root, failed = (
            torch.stack(same) for same in zip(*map(torch.linalg.cholesky_ex, matrix), strict=True)
        )
    else:
        root, failed = torch.linalg.cholesky_ex(matrix)
    return root, failed


def cholesky_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverse of [..., d, d], and flags [...] that are not zero where Cholesky failed.

    The flags are not looked at here: reading them makes the host wait for the device, and once for
    all blocks together is enough.
    """
    find = _root_on_gpu if matrix.is_cuda else torch.linalg.cholesky_ex
    root, failed = find(matrix)
    # What is left of a failure may not divide by zero; the rest of it is of no use, but small work.
    torch.diagonal(root, 0, -2, -1).masked_fill_((failed != 0).unsqueeze(-1), 1.0)
    if root.is_cuda:  # its solver takes several times as long as products
        return symmetric_product(triangular_inverse(root), triangular=True), failed
    return torch.cholesky_inverse(root.mT, upper=True), failed  # quicker than from the lower one


def cholesky_whitener(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return W, lower triangular, with W matrix W^T = I and W^T W = matrix^-1, and flags.

    W is the identity where Cholesky failed: eigenvalues are taken of what comes of it, and LAPACK
    raises on what is not finite.
    """
    find = _root_on_gpu if matrix.is_cuda else torch.linalg.cholesky_ex
    root, failed = find(matrix)
    # In place: the memory of large copies costs as much as the factorisation of small matrices.
    root.masked_fill_((failed != 0).unsqueeze(-1).unsqueeze(-1), 0.0)
    torch.diagonal(root, 0, -2, -1).add_((failed != 0).to(matrix.dtype).unsqueeze(-1))
    return triangular_inverse(root), failed


def raised(eigenvalues: Tensor) -> Tensor:
    """Return eigenvalues [..., d], raised to the rounding error of the largest and above zero."""
    largest = eigenvalues.abs().amax(-1, keepdim=True)
    rounding = torch.nextafter(largest, largest + largest) - largest
    return eigenvalues.maximum(rounding * eigenvalues.shape[-1]).clamp_min(1e-30)


def floored_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverse of [..., d, d] with its eigenvalues raised, and flags that are zero.

    It serves where Cholesky refuses the matrix, and it cannot fail.
    """
    spectrum = torch.linalg.eigh(matrix)
    values, vectors = raised(spectrum[0]), spectrum[1]
    inverse = (vectors / values.unsqueeze(-2)) @ vectors.mT
    return inverse, torch.zeros_like(matrix[..., 0, 0], dtype=torch.int32)


def floored_whitener(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``cholesky_whitener`` with the eigenvalues of [..., d, d] raised; it cannot fail."""
    spectrum = torch.linalg.eigh(matrix)
    whitener = torch.rsqrt(raised(spectrum[0])).unsqueeze(-1) * spectrum[1].mT
    # Of Q R W^T W keeps R; with the columns in reverse order, R becomes a lower triangle.
    triangle = torch.linalg.qr(whitener.flip(-1))[1].flip(-2, -1)
    return triangle, torch.zeros_like(matrix[..., 0, 0], dtype=torch.int32)


Solve = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From a positive matrix [..., d, d] to another matrix made of it, and flags [...] of failure."""


class Factorise(NamedTuple):
    """Two functions that invert and whiten a positive matrix; both say where they failed."""

    inverse: Solve
    whitener: Solve


CHOLESKY = Factorise(cholesky_inverse, cholesky_whitener)
FLOORED = Factorise(floored_inverse, floored_whitener)
