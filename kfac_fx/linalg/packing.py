"""Symmetric matrices by one half, n (n + 1) / 2 entries, as flat tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def packed(M: Tensor) -> Tensor:
    """The upper half of a symmetric M [..., n, n], flat.

    With k = n // 2 the blocks M_11 and M_22 share a rectangle: the upper triangle of M_11 (for even
    n moved by one column) and the lower one of M_22 (for odd n moved by one row); M_12 follows.
    """
    k, odd = _middle(M.shape[-1])
    first, cross, second = M[..., :k, :k], M[..., :k, k:], M[..., k:, k:]
    if odd:
        rectangle = torch.triu(first)
        rectangle[..., 1:, :-1] += torch.tril(second)
    else:
        rectangle = first.new_zeros((*M.shape[:-2], k, k + 1))
        rectangle[..., 1:] = torch.triu(first)
        rectangle[..., :-1] += torch.tril(second)
    return torch.cat([rectangle.reshape(-1), cross.reshape(-1)])


def unpacked(flat: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of ``packed``, for a matrix of ``shape``; bitwise symmetric."""
    n = shape[-1]
    k, odd = _middle(n)
    lead = shape[:-2]
    across = lead.numel() * k * (k if odd else k + 1)
    rectangle = flat[:across].reshape(*lead, k, k if odd else k + 1)
    M = flat.new_empty(shape)
    M[..., :k, k:] = flat[across:].reshape(*lead, k, n - k)
    M[..., k:, :k] = M[..., :k, k:].mT
    upper = torch.triu(rectangle if odd else rectangle[..., 1:])
    lower = torch.tril(rectangle[..., 1:, :-1] if odd else rectangle[..., :-1])
    M[..., :k, :k] = upper + torch.triu(upper, 1).mT
    M[..., k:, k:] = lower + torch.tril(lower, -1).mT
    return M


def packed_size(shape: torch.Size) -> int:
    """Length of the flat form."""
    n = shape[-1]
    return shape[:-2].numel() * n * (n + 1) // 2


def _middle(n: int) -> tuple[int, bool]:
    """The side of M_11, and whether n is odd."""
    return (n + 1) // 2, n % 2 == 1
