"""Positions of two uses on one grid, so that their joint second moments stay positive.

Each side is averaged over the cells of the coarser grid and scaled so that the averaging does not
lengthen any vector: the pooled Gram matrix is then dominated by the whole one (Jensen), and
[[A_ii, A_ij], [A_ji, A_jj]] stays positive (docs/explanation/mathematics.md, section 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Common(NamedTuple):
    """The cases and the grid that two uses share.

    Attributes:
        cases: number of cases of both.
        first: positions of the first use, as they are pooled.
        second: the same of the second.
        grid: the coarser grid that both are pooled to.
    """

    cases: int
    first: tuple[int, ...]
    second: tuple[int, ...]
    grid: tuple[int, ...]


def common_grid(first: Sequence[int], second: Sequence[int], ordered: bool) -> Common | None:
    """Return the coarser grid of two shapes (cases, *positions); None where cases do not match.

    Where one side counts parts of a case as cases (windows, rows of a flattened batch), these
    become positions. Positions of different rank match in order if they are as many, else only on
    average.

    Args:
        first: shape of the one use.
        second: shape of the other.
        ordered: whether the parts of a case come in the order of the other side's positions; if
            not, they are matched by their average alone.
    """
    n, one = first[0], first[1:]
    m, two = second[0], second[1:]
    if n == m and len(one) == len(two):
        return Common(n, tuple(one), tuple(two), tuple(map(min, one, two)))
    cases = min(n, m)
    # No common case: the pair is left uncoupled for this batch rather than matched by chance.
    if cases == 0 or max(n, m) % cases:
        return None
    here, there = prod(one) * (n // cases), prod(two) * (m // cases)
    # Windows and flattened rows count parts of a case as cases. As many parts on both sides, in the
    # same order, are matched one by one; anything else only shares the case, a grid of one cell.
    grid = here if here == there and (n == m or ordered) else 1
    return Common(cases, (here,), (there,), (grid,))


def by_case(rows: Tensor, cases: int, positions: Sequence[int], interleaved: bool) -> Tensor:
    """Return rows [n, *own, d] as [cases, *positions, d], where n is a multiple of the cases.

    Args:
        interleaved: whether the parts of a case are n / cases apart rather than neighbours.
    """
    if interleaved and rows.shape[0] != cases:
        rows = rows.reshape(-1, cases, *rows.shape[1:]).transpose(0, 1)
    return rows.reshape(cases, *positions, rows.shape[-1])


def from_cases(rows: Tensor, own: Sequence[int], interleaved: bool) -> Tensor:
    """Return what ``by_case`` was given, for own = (n, *own)."""
    if interleaved and rows.shape[0] != own[0]:
        rows = rows.transpose(0, 1)
    return rows.reshape(*own, rows.shape[-1])


def _cells(size: int, cells: int, like: Tensor) -> Tensor:
    """Return averages over the windows of adaptive pooling, [cells, size], of norm at most one.

    Windows of uneven cells overlap. The rows are divided by the root of the largest column sum,
    which bounds the norm of the matrix, so that pooling lengthens no vector.
    """
    cell = torch.arange(cells, device=like.device).unsqueeze(-1)
    place = torch.arange(size, device=like.device)
    inside = (place * cells < (cell + 1) * size) & ((place + 1) * cells > cell * size)
    average = inside.to(like.dtype) / inside.sum(1, keepdim=True)
    return average / average.sum(0).max().sqrt()


def pooled(rows: Tensor, grid: Sequence[int]) -> Tensor:
    """Return rows [cases, *positions, d] averaged to [cases, *grid, d], scaled by sqrt of a cell.

    Sums over a cell are divided by the root of its size, not by its size: then the Gram matrix of a
    constant keeps its length, and that of any rows gets no longer.
    """
    for axis, cells in enumerate(grid, start=1):
        size = rows.shape[axis]
        # Equal cells are a reshape; uneven ones need a small product with the averages.
        if size != cells and size % cells == 0:
            each = size // cells
            # Not unflatten, which cannot be batched over the columns of an exact Fisher.
            split = rows.reshape(*rows.shape[:axis], cells, each, *rows.shape[axis + 1 :])
            rows = split.sum(axis + 1) / each**0.5
        elif size != cells:
            average = _cells(size, cells, rows)
            rows = torch.tensordot(rows, average, ([axis], [1])).movedim(-1, axis)
    return rows


def spread(rows: Tensor, positions: Sequence[int]) -> Tensor:
    """Return the adjoint of ``pooled``: [cases, *grid, d] -> [cases, *positions, d]."""
    for axis, size in enumerate(positions, start=1):
        cells = rows.shape[axis]
        if size != cells and size % cells == 0:
            each = size // cells
            wide = rows.unsqueeze(axis + 1) / each**0.5
            wide = wide.expand(*rows.shape[: axis + 1], each, *rows.shape[axis + 1 :])
            rows = wide.flatten(axis, axis + 1)
        elif size != cells:
            average = _cells(size, cells, rows)
            rows = torch.tensordot(rows, average, ([axis], [0])).movedim(-1, axis)
    return rows
