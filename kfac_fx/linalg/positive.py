"""Inverses of symmetric positive definite matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_fx.linalg.triangular import symmetric_product, triangular_inverse


def _root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The lower Cholesky root, and flags that are not zero where there is none."""
    d = matrix.shape[-1]
    if matrix.is_cuda and matrix.dim() == 3 and d >= 2048 and len(matrix) <= 8:
        # Few large ones: their stack takes up to twice as long as all in turn.
        root, failed = (
            torch.stack(same) for same in zip(*map(torch.linalg.cholesky_ex, matrix), strict=True)
        )
    else:
        root, failed = torch.linalg.cholesky_ex(matrix)
    return root, failed


def cholesky_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse by Cholesky of [..., d, d], and flags [...] that are not zero where it failed."""
    root, failed = _root(matrix)
    # What is left of a failure may not divide by zero; the rest of it is of no use, but small work.
    torch.diagonal(root, 0, -2, -1).masked_fill_((failed != 0).unsqueeze(-1), 1.0)
    if root.is_cuda:  # its solver takes several times as long as products
        return symmetric_product(triangular_inverse(root), triangular=True), failed
    return torch.cholesky_inverse(root.mT, upper=True), failed  # quicker than from the lower one


def cholesky_whitener(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """W, lower triangular, with W matrix W^T = I and W^T W = matrix^-1: [..., d, d]; flags too.

    The identity where it failed: eigenvalues are taken of what comes of it.
    """
    root, failed = _root(matrix)
    # In place: the memory of large copies costs as much as the factorisation of small matrices.
    root.masked_fill_((failed != 0).unsqueeze(-1).unsqueeze(-1), 0.0)
    torch.diagonal(root, 0, -2, -1).add_((failed != 0).to(matrix.dtype).unsqueeze(-1))
    return triangular_inverse(root), failed


def raised(eigenvalues: Tensor) -> Tensor:
    """Eigenvalues [..., d], raised to the rounding error of the largest and above zero."""
    largest = eigenvalues.abs().amax(-1, keepdim=True)
    rounding = torch.nextafter(largest, largest + largest) - largest
    return eigenvalues.maximum(rounding * eigenvalues.shape[-1]).clamp_min(1e-30)


def floored_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of [..., d, d] with its eigenvalues raised, where Cholesky refuses the matrix.

    It cannot fail, so the flags are zero.
    """
    spectrum = torch.linalg.eigh(matrix)
    values, vectors = raised(spectrum[0]), spectrum[1]
    inverse = (vectors / values.unsqueeze(-2)) @ vectors.mT
    return inverse, torch.zeros_like(matrix[..., 0, 0], dtype=torch.int32)


def floored_whitener(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``cholesky_whitener`` with the eigenvalues of [..., d, d] raised; it cannot fail."""
    spectrum = torch.linalg.eigh(matrix)
    whitener = torch.rsqrt(raised(spectrum[0])).unsqueeze(-1) * spectrum[1].mT
    # Of Q R W^T W keeps R; with the columns in reverse order, R becomes a lower triangle.
    triangle = torch.linalg.qr(whitener.flip(-1))[1].flip(-2, -1)
    return triangle, torch.zeros_like(matrix[..., 0, 0], dtype=torch.int32)


class Factorise(NamedTuple):
    """How a positive matrix is inverted and whitened; both also say where they failed."""

    inverse: Callable[[Any], tuple[Any, Any]]
    whitener: Callable[[Any], tuple[Any, Any]]


CHOLESKY = Factorise(cholesky_inverse, cholesky_whitener)
FLOORED = Factorise(floored_inverse, floored_whitener)
