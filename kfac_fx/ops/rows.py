"""Second moments of few rows: on a CPU they stay unmultiplied until they enter an average.

Fewer rows than features take less memory than their Gram matrix, which then is added to the average
where that stays, one half of it: no matrix of its own, no copied half, no pass over it to scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kfac_fx.ops.gram import Range, gram
from kfac_fx.ops.modes import functional

WIDTH = 128
"""Features of a slab, for each thread: of few rows, narrower ones multiply slowly."""


class Rows:
    """``scale`` times the sum over rows of the outer product, [d, d], of rows [S, d], S < d.

    It is divided, multiplied and added as the matrix would be; a sum is the matrix.

    Args:
        rows: nobody else changes them.
    """

    def __init__(self, rows: Tensor, scale: float) -> None:
        self.rows, self.scale = rows, scale
        self._shared = False
        self._product: Tensor | None = None

    def again(self) -> Rows:
        """The same for a further average: the product is formed once for all of them."""
        self._shared = True
        return self

    def product(self) -> Tensor:
        """The matrix, the caller's own."""
        return gram(self.rows, self.scale)

    def add_to(self, average: Tensor, weight: float) -> bool:
        """average <- (1 - weight) average + weight product; whether above the diagonal alone."""
        if self._shared:
            self._product = self.product() if self._product is None else self._product
            average.lerp_(self._product, weight)
            return False
        for start, end in _slabs(self.rows.shape[1]):
            slab, rows = average[start:end, start:], self.rows[:, start:]
            left = rows[:, : end - start].mT
            torch.addmm(slab, left, rows, beta=1 - weight, alpha=weight * self.scale, out=slab)
        return True

    def diagonal(self, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tensor:
        """The matrix's, [d]."""
        assert (offset, dim1, dim2) == (0, -2, -1)
        return self.rows.square().sum(0) * self.scale

    def dim(self) -> int:
        """Of the matrix."""
        return 2

    def __mul__(self, factor: float) -> Rows:
        return Rows(self.rows, self.scale * factor)

    def __truediv__(self, divisor: float | Tensor) -> Rows | Tensor:
        return self.product() / divisor if isinstance(divisor, Tensor) else self * (1 / divisor)

    def __add__(self, other: Statistic) -> Tensor:
        total: Tensor = self.product() + multiplied(other)
        return total

    __radd__ = __add__


Statistic = Tensor | Rows


def stay(rows: Tensor) -> bool:
    """Whether rows stay unmultiplied."""
    count, d = rows.shape[-2:]
    few = rows.dim() == 2 and count < d and bool(_slabs(d))
    return few and rows.device.type == "cpu" and not (rows.is_complex() or functional(rows))


def moment(rows: Tensor, scale: float = 1.0) -> Statistic:
    """``gram``; the rows are nobody else's."""
    return Rows(rows, scale) if stay(rows) else gram(rows, scale)


def multiplied(statistic: Any) -> Any:
    """A statistic as a tensor; None as it is."""
    return statistic.product() if isinstance(statistic, Rows) else statistic


def _slabs(d: int) -> list[Range]:
    """Ranges of features; none where the matrix is small."""
    width = WIDTH * torch.get_num_threads()
    ends = range(0, d, width) if d >= 2 * width else ()
    return [(start, min(start + width, d)) for start in ends]
