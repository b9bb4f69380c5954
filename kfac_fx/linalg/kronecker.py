"""Products with A (x) G, vec() stacking the columns of [W b] (curvature.md section 1)."""

from __future__ import annotations

from torch import Tensor


def kronecker_product(A: Tensor, G: Tensor, V: Tensor) -> Tensor:
    """(A (x) G) vec(V) as a matrix, G V A^T: A [..., a, a], G [..., g, g], V [..., g, a]."""
    return G @ V @ A
