"""Products and inverses with A (x) G and with sums of two such products.

vec() stacks the columns of [W b], so that (A (x) G) vec(V) = vec(G V A^T)
(docs/explanation/mathematics.md, section 1). Either side may be a diagonal, kept as a vector, or
cut into sub-blocks along its diagonal.
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
    """Return (A (x) G) vec(V) as a matrix, G V A, of V [..., g, a] and symmetric A.

    Args:
        A, G: [..., a, a] and [..., g, g]; None for the identity.
        V: the vector, as the matrix [..., g, a].
        diagonal: whether A and G are vectors [..., a] and [..., g].
        cut: the numbers k of sub-blocks that A and G are kept as, [k, b, b]; 0 where they are
            whole. Those sides of V have k b entries, so V must be filled up first.
    """
    if G is None:
        pass
    elif cut[1]:
        V = (G @ V.unflatten(-2, (cut[1], -1))).flatten(-3, -2)
    else:
        V = G.unsqueeze(-1) * V if diagonal[1] else G @ V
    if A is None:
        return V
    if cut[0]:  # each sub-block meets its own columns of V, as a batch of products
        parts = V.unflatten(-1, (cut[0], -1)).transpose(-3, -2)
        product: Tensor = (parts @ A).transpose(-3, -2).flatten(-2)
        return product
    return V * A.unsqueeze(-2) if diagonal[0] else V @ A


def filled_up(V: Tensor, missing: tuple[int, int]) -> Tensor:
    """Return V [..., g, a] with zeros after its columns and rows, for sides that are cut."""
    return torch.nn.functional.pad(V, (0, missing[0], 0, missing[1])) if any(missing) else V


def without_filling(V: Tensor, missing: tuple[int, int]) -> Tensor:
    """Return what ``filled_up`` was given."""
    V = V[..., : -missing[0]] if missing[0] else V
    return V[..., : -missing[1], :] if missing[1] else V


# A (x) G + lambda I: docs/explanation/mathematics.md, section 5.


def eigenbasis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return (s, U) with matrix = U diag(s) U^T, of a positive [..., d, d]; s is at least zero."""
    spectrum = torch.linalg.eigh(matrix)
    return spectrum[0].clamp_min(0.0), spectrum[1]


def damped_scale(s_A: Tensor, s_G: Tensor, damping: Tensor) -> Tensor:
    """Return 1 / (s_G s_A^T + lambda), [..., g, a], of eigenvalues [..., a] and [..., g]."""
    return torch.reciprocal(s_G.unsqueeze(-1) * s_A.unsqueeze(-2) + damping)


def moment_scale(S: Tensor, damping: Tensor) -> Tensor:
    """Return 1 / (S + lambda), of second moments S in the bases, [..., g, a]."""
    return torch.reciprocal(S + damping)


def eigen_product(
    U_A: Tensor | None,
    U_G: Tensor | None,
    scale: Tensor,
    V: Tensor,
    *,
    cut: tuple[int, int] = (0, 0),
) -> Tensor:
    """Return (U_A (x) U_G) diag(scale) (U_A (x) U_G)^T vec(V), U_G [(U_G^T V U_A) * scale] U_A^T.

    Args:
        U_A, U_G: orthonormal bases; None for the identity.
        scale: [..., g, a], one over the eigenvalues for an inverse.
        V: [..., g, a].
        cut: see ``kronecker_product``.
    """
    inner = kronecker_product(U_A, None if U_G is None else U_G.mT, V, cut=cut) * scale
    return kronecker_product(None if U_A is None else U_A.mT, U_G, inner, cut=cut)


# A (x) G + C (x) D.


def common_basis(damped: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return K and s with K^T damped K = I and K^T other K = diag(s): [..., d, d], [..., d].

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
    """Return (A (x) G + C (x) D)^-1 vec(V), from the common bases of (A, C) and of (G, D).

    As appendix B of Martens & Grosse 2015, with a sum in place of the difference.

    Args:
        K_A, K_G: common bases, see ``common_basis``.
        s_A, s_G: their relative eigenvalues, flat also where a side is cut.
        V: [..., g, a].
        diagonal: whether K_A and K_G are diagonals, kept as vectors.
        cut: see ``kronecker_product``.
    """
    left = K_G if diagonal[1] else K_G.mT
    inner = kronecker_product(K_A, left, V, diagonal=diagonal, cut=cut)
    inner = inner / (1.0 + s_G.unsqueeze(-1) * s_A)
    right = K_A if diagonal[0] else K_A.mT
    return kronecker_product(right, K_G, inner, diagonal=diagonal, cut=cut)
