"""A (x) G + lambda I in the eigenbases of A and G (docs/explanation/mathematics.md, section 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_fx.linalg.kronecker import kronecker_product


def eigenbasis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(s, U) with matrix = U diag(s) U^T, of a positive matrix [..., d, d]; s is at least zero."""
    spectrum = torch.linalg.eigh(matrix)
    return spectrum[0].clamp_min(0.0), spectrum[1]


def damped_scale(s_A: Tensor, s_G: Tensor, damping: Tensor) -> Tensor:
    """1 / (s_G s_A^T + lambda), [..., g, a]."""
    return torch.reciprocal(s_G.unsqueeze(-1) * s_A.unsqueeze(-2) + damping)


def moment_scale(S: Tensor, damping: Tensor) -> Tensor:
    """1 / (S + lambda), of second moments S in the bases, [..., g, a]."""
    return torch.reciprocal(S + damping)


def eigen_product(
    U_A: Tensor | None,
    U_G: Tensor | None,
    scale: Tensor,
    V: Tensor,
    *,
    cut: tuple[int, int] = (0, 0),
) -> Tensor:
    """(U_A (x) U_G) diag(scale) (U_A (x) U_G)^T vec(V), U_G [(U_G^T V U_A) * scale] U_A^T.

    Args:
        U_A, U_G: None for the identity.
        cut: see ``kronecker_product``.
    """
    inner = kronecker_product(U_A, None if U_G is None else U_G.mT, V, cut=cut) * scale
    return kronecker_product(None if U_A is None else U_A.mT, U_G, inner, cut=cut)
