"""Conditionals of block-tridiagonal K-FAC (Martens & Grosse 2015, section 4.3 and appendix B).

A child i with the parent p has Psi = F_ip F_pp^-1 and Sigma = F_ii - Psi F_pp Psi^T, both of
Kronecker form (docs/explanation/mathematics.md, section 7). In the canonical coordinates of a
side (A or G), both blocks are white and their correlation Q = U diag(sqrt(s)) T^T is diagonal:
every pair of coordinates is a 2 x 2 problem, and Sigma has the entries 1 - s_G s_A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_fx.linalg.positive import symmetric_product, triangular_product


def correlation(W: Tensor, cross: Tensor, W_parent: Tensor) -> Tensor:
    """Return Q = W A_ip W_p^T, whose singular values are the canonical correlations of a side.

    Args:
        W, W_parent: lower triangular whiteners of the sides, [n, n] and [m, m]: W A_ii W^T = I.
        cross: A_ip, [n, m].
    """
    return triangular_product(W, triangular_product(W_parent, cross.mT).mT)


def conditional_side(
    W: Tensor, cross: Tensor, W_parent: Tensor, *, from_child: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (L, s, R): canonical coordinates L^T a_i and R^T a_p of child and parent, and their s.

    L [n, k] and R [m, k], where k is the dimension that the eigenvectors are taken of: the child's
    (then R carries the sqrt(s)) or the parent's (then L does); the smaller is cheaper, and exact.
    """
    # Parent and child are on a par in a pair: the other case is this one with both exchanged.
    if not from_child:
        R, s, L = conditional_side(W_parent, cross.mT, W, from_child=True)
        return L, s, R
    Q = correlation(W, cross, W_parent)
    # Of I - Q Q^T: LAPACK fails on some matrices with many zero rows (dead units).
    square = symmetric_product(Q.mT).neg_()
    torch.diagonal(square).add_(1.0)
    spectrum = torch.linalg.eigh(square)
    s, E = (1.0 - spectrum[0]).clamp_min(0.0), spectrum[1]
    L = triangular_product(W, E, transposed=True)
    return L, s, triangular_product(W_parent, Q.mT @ E, transposed=True)


def conditional_scale(s_A: Tensor, s_G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return 1 / (1 - s_G s_A^T), how many entries were clamped, and whether Sigma is indefinite.

    Products are kept below one by the square root of the rounding error; a product above one by
    more than that is no rounding.
    """
    # In exact arithmetic all products are below one. The slack keeps what is divided by far above
    # the rounding of s, which has about the error of an eigenvalue: eps.
    product = s_G.unsqueeze(-1) * s_A
    slack = torch.finfo(product.dtype).eps ** 0.5
    clamped = (product > 1.0 - slack).sum()
    indefinite = (product > 1.0 + slack).any()
    return torch.reciprocal(1.0 - product.clamp_max(1.0 - slack)), clamped, indefinite


def mutual_information(r_A: Tensor, r_G: Tensor) -> Tensor:
    """Return -1/2 sum_kl log(1 - (r_k s_l)^2), r and s the canonical correlations of A and of G.

    The forest that keeps most of it is the closest to Ftilde in the Kullback-Leibler sense
    (Chow & Liu 1968).

    Args:
        r_A, r_G: squared singular values of ``correlation`` of either side.
    """
    product = r_G.unsqueeze(-1) * r_A
    slack = torch.finfo(product.dtype).eps ** 0.5
    return -0.5 * torch.log1p(-product.clamp_max(1.0 - slack)).sum()
