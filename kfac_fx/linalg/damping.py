"""Tikhonov damping (docs/explanation/mathematics.md, section 5).

Its sources are sections 6.3 and 6.6 of Martens & Grosse (2015).
"""

from __future__ import annotations

import torch
from torch import Tensor


def damped(matrix: Tensor, amount: Tensor) -> Tensor:
    """matrix + amount * I, over leading batch dimensions: [..., d, d] and [...]."""
    diagonal = torch.diagonal(matrix, 0, -2, -1)
    return torch.diagonal_scatter(matrix, diagonal + amount.unsqueeze(-1), 0, -2, -1)


def mean_eigenvalue(matrix: Tensor, *, diagonal: bool = False, cut: int = 0) -> Tensor:
    """tr(matrix) / dim: [..., d, d] (or its diagonal [..., d]) -> [...].

    Args:
        cut: the dimension of a matrix that is kept as sub-blocks [..., k, b, b], else 0.
    """
    if cut:
        return torch.diagonal(matrix, 0, -2, -1).sum((-2, -1)) / cut
    return (matrix if diagonal else torch.diagonal(matrix, 0, -2, -1)).mean(-1)


def trace_ratio(a: Tensor, g: Tensor) -> Tensor:
    """pi = sqrt(a / g) for a = tr A / dim A, g = tr G / dim G; 1 where either is zero."""
    return torch.where((a > 0) & (g > 0), torch.sqrt(a) / torch.sqrt(g), 1.0)


def factored_amounts(a: Tensor, g: Tensor, gamma: Tensor | float) -> tuple[Tensor, Tensor]:
    """(pi gamma, gamma / pi): what factored Tikhonov damping adds to A and to G.

    Args:
        a, g: as for ``trace_ratio``.
    """
    pi = trace_ratio(a, g)
    return pi * gamma, gamma / pi
