"""Products and inverses with A (x) G, vec() stacking the columns of [W b].

curvature.md section 1. Either side may be a diagonal, kept as a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_fx.linalg.positive import raised


def kronecker_product(
    A: Tensor, G: Tensor, V: Tensor, *, diagonal: tuple[bool, bool] = (False, False)
) -> Tensor:
    """(A (x) G) vec(V) as a matrix, G V A: A [..., a, a], G [..., g, g], V [..., g, a].

    Args:
        diagonal: whether A and G are vectors [..., a] and [..., g].
    """
    V = G.unsqueeze(-1) * V if diagonal[1] else G @ V
    return V * A.unsqueeze(-2) if diagonal[0] else V @ A


def common_basis(damped: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """K and s with K^T damped K = I and K^T other K = diag(s): [d, d] -> [d, d], [d].

    Eigenvalues of ``damped`` are raised to rounding level, those of ``other`` to zero.
    """
    spectrum = torch.linalg.eigh(damped)
    root = spectrum[1] * torch.rsqrt(raised(spectrum[0])).unsqueeze(-2)
    relative = torch.linalg.eigh(root.mT @ other @ root)
    return root @ relative[1], relative[0].clamp_min(0.0)


def sum_inverse_product(
    K_A: Tensor,
    K_G: Tensor,
    s_A: Tensor,
    s_G: Tensor,
    V: Tensor,
    *,
    diagonal: tuple[bool, bool] = (False, False),
) -> Tensor:
    """(A (x) G + C (x) D)^-1 vec(V), from the common bases of (A, C) and of (G, D).

    As appendix B of Martens & Grosse 2015, with a sum in place of the difference.

    Args:
        diagonal: whether K_A and K_G are diagonals, kept as vectors.
    """
    inner = kronecker_product(K_A, K_G if diagonal[1] else K_G.mT, V, diagonal=diagonal)
    inner = inner / (1.0 + s_G.unsqueeze(-1) * s_A)
    return kronecker_product(K_A if diagonal[0] else K_A.mT, K_G, inner, diagonal=diagonal)
