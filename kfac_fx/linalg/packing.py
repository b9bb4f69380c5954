"""Symmetric matrices by one half: n (n + 1) / 2 entries as flat tensors, or where they are."""

from __future__ import annotations

import torch
from torch import Tensor


def packed(M: Tensor) -> Tensor:
    """Return the upper half of a symmetric M [..., n, n], flat.

    With k = (n + 1) // 2 the blocks M_11 and M_22 share a rectangle: the upper triangle of M_11
    (for even n moved by one column) and the lower one of M_22 (for odd n moved by one row); M_12
    follows.
    """
    # Three copies of blocks in place of an index of n^2 / 2 entries, which would be as large as the
    # matrix and read at random.
    k, odd = _middle(M.shape[-1])
    first, cross, second = M[..., :k, :k], M[..., :k, k:], M[..., k:, k:]
    rectangle = M.new_empty((*M.shape[:-2], k, k if odd else k + 1))
    upper, lower = _triangles(rectangle, odd)
    upper.copy_(first)
    lower.copy_(torch.where(_below(lower), second, lower))
    return torch.cat([rectangle.reshape(-1), cross.reshape(-1)])


def unpacked(flat: Tensor, shape: torch.Size) -> Tensor:
    """Return the matrix of ``shape`` that ``packed`` was given; bitwise symmetric."""
    n = shape[-1]
    k, odd = _middle(n)
    lead = shape[:-2]
    across = lead.numel() * k * (k if odd else k + 1)
    upper, lower = _triangles(flat[:across].reshape(*lead, k, k if odd else k + 1), odd)
    M = flat.new_empty(shape)
    M[..., :k, k:] = flat[across:].reshape(*lead, k, n - k)
    M[..., k:, :k] = M[..., :k, k:].mT
    # Triangles share a rectangle: each reads its own half of it, twice.
    M[..., :k, :k] = torch.where(_below(upper).mT, upper, upper.mT)
    M[..., k:, k:] = torch.where(_below(lower), lower, lower.mT)
    return M


def mirror(M: Tensor) -> None:
    """Copy what is above the diagonals of [..., n, n] to what is below them, in place.

    Nothing above them is written to, but with what it is: two threads may do it at once.
    """
    M.copy_(torch.where(_below(M), M.mT, M))


def packed_size(shape: torch.Size) -> int:
    """Return the length of the flat form."""
    n = shape[-1]
    return shape[:-2].numel() * n * (n + 1) // 2


def _middle(n: int) -> tuple[int, bool]:
    """Return the side of M_11, and whether n is odd."""
    return (n + 1) // 2, n % 2 == 1


def _triangles(rectangle: Tensor, odd: bool) -> tuple[Tensor, Tensor]:
    """Return where M_11 is, in the upper triangle, and M_22, in the lower one."""
    if odd:
        return rectangle, rectangle[..., 1:, :-1]
    return rectangle[..., 1:], rectangle[..., :-1]


def _below(square: Tensor) -> Tensor:
    """Return which entries are on the diagonal or below it."""
    places = torch.arange(square.shape[-1], device=square.device)
    return places.unsqueeze(-1) >= places
