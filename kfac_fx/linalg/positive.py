"""Inverses of symmetric positive definite matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_fx.linalg.damping import damped


def cholesky_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse by Cholesky of [..., d, d], and flags [...] that are not zero where it failed."""
    factorisation = torch.linalg.cholesky_ex(matrix)
    failed = factorisation[1]
    # cholesky_inverse raises at a zero on the diagonal: a failed root becomes the identity.
    root = torch.where((failed != 0).unsqueeze(-1).unsqueeze(-1), 0.0, factorisation[0])
    return torch.cholesky_inverse(damped(root, (failed != 0).to(matrix.dtype))), failed


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
