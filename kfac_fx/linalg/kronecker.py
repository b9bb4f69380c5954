"""Products and inverses with A (x) G, vec() stacking the columns of [W b].

See docs/explanation/mathematics.md, section 1. Either side may be a diagonal, kept as a
vector, or cut into sub-blocks along its diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_fx.linalg.positive import raised


def kronecker_product(
    A: Tensor | None,
    G: Tensor | None,
    V: Tensor,
    *,
    diagonal: tuple[bool, bool] = (False, False),
    cut: tuple[int, int] = (0, 0),
) -> Tensor:
    """(A (x) G) vec(V) as a matrix, G V A: A [..., a, a], G [..., g, g], V [..., g, a].

    Args:
        A, G: None for the identity.
        diagonal: whether A and G are vectors [..., a] and [..., g].
        cut: the numbers k of sub-blocks that A and G are kept as, [k, b, b]; 0 where they are
            whole. Those sides of V have k b entries.
    """
    if G is None:
        pass
    elif cut[1]:
        V = (G @ V.unflatten(-2, (cut[1], -1))).flatten(-3, -2)
    else:
        V = G.unsqueeze(-1) * V if diagonal[1] else G @ V
    if A is None:
        return V
    if cut[0]:
        parts = V.unflatten(-1, (cut[0], -1)).transpose(-3, -2)
        product: Tensor = (parts @ A).transpose(-3, -2).flatten(-2)
        return product
    return V * A.unsqueeze(-2) if diagonal[0] else V @ A


def filled_up(V: Tensor, missing: tuple[int, int]) -> Tensor:
    """V [..., g, a] with zeros behind its columns (first) and rows, for sides that are cut."""
    return torch.nn.functional.pad(V, (0, missing[0], 0, missing[1])) if any(missing) else V


def without_filling(V: Tensor, missing: tuple[int, int]) -> Tensor:
    """The inverse of ``filled_up``."""
    V = V[..., : -missing[0]] if missing[0] else V
    return V[..., : -missing[1], :] if missing[1] else V


def common_basis(damped: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """K and s with K^T damped K = I and K^T other K = diag(s): [..., d, d] -> the same, [..., d].

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
    cut: tuple[int, int] = (0, 0),
) -> Tensor:
    """(A (x) G + C (x) D)^-1 vec(V), from the common bases of (A, C) and of (G, D).

    As appendix B of Martens & Grosse 2015, with a sum in place of the difference.

    Args:
        diagonal: whether K_A and K_G are diagonals, kept as vectors.
        cut: see ``kronecker_product``; s_A and s_G are flat.
    """
    left = K_G if diagonal[1] else K_G.mT
    inner = kronecker_product(K_A, left, V, diagonal=diagonal, cut=cut)
    inner = inner / (1.0 + s_G.unsqueeze(-1) * s_A)
    right = K_A if diagonal[0] else K_A.mT
    return kronecker_product(right, K_G, inner, diagonal=diagonal, cut=cut)
