"""Inverses of symmetric positive definite matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def cholesky_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse by Cholesky of [..., d, d], and flags [...] that are not zero where it failed."""
    factorisation = torch.linalg.cholesky_ex(matrix)
    return torch.cholesky_inverse(factorisation[0]), factorisation[1]


def floored_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse with eigenvalues raised to rounding level: for matrices that Cholesky refuses.

    It cannot fail, so the flags are zero.
    """
    values, vectors = torch.linalg.eigh(matrix)
    floor = values.abs().amax(-1, keepdim=True) * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    values = values.maximum(floor).clamp_min(torch.finfo(matrix.dtype).tiny)
    inverse = (vectors / values.unsqueeze(-2)) @ vectors.mT
    return inverse, torch.zeros(matrix.shape[:-2], dtype=torch.int32, device=matrix.device)
