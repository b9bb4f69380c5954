"""Second moments of few rows: noted ones stay unmultiplied, on a CPU, until they enter an average.

Fewer rows than features take less memory than their Gram matrix, which then is added to the average
where that stays, one half of it: no matrix of its own, no copied half, no pass over it to scale.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import overload

import torch
from torch import Tensor

from kfac_fx.ops.gram import Range, gram

WIDTH = 128
"""Features of a slab, for each thread: of few rows, narrower ones multiply slowly."""


class Rows:
    """``scale`` times the sum over rows of the outer product, [d, d], of rows [S, d], S < d.

    Args:
        rows: nobody else changes them.

    Attributes:
        shared: whether several averages take it; then its product is formed once.
    """

    def __init__(self, rows: Tensor, scale: float) -> None:
        self.rows, self.scale, self.shared = rows, scale, False
        self._product: Tensor | None = None

    def __mul__(self, factor: float) -> Rows:
        return Rows(self.rows, self.scale * factor)

    def product(self) -> Tensor:
        """The matrix; of shared rows the same one for all."""
        if self._product is not None:
            return self._product
        with torch.autocast(self.rows.device.type, enabled=False):
            product = gram(self.rows, self.scale)
        self._product = product if self.shared else None
        return product

    def diagonal(self) -> Tensor:
        """The matrix's, [d]."""
        return self.rows.square().sum(0) * self.scale

    @property
    def halves(self) -> bool:
        """Whether ``add_to`` leaves what is below the diagonal out of date."""
        return not self.shared and len(_slabs(self.rows.shape[1])) > 1

    def add_to(self, average: Tensor, weight: float) -> None:
        """average <- (1 - weight) average + weight product."""
        if self.shared:
            average.lerp_(self.product(), weight)
            return
        for start, end in _slabs(self.rows.shape[1]):
            slab, rows = average[start:end, start:], self.rows[:, start:]
            left = rows[:, : end - start].mT
            torch.addmm(slab, left, rows, beta=1 - weight, alpha=weight * self.scale, out=slab)


Statistic = Tensor | Rows


class _Kept(threading.local):
    on = False


_kept = _Kept()


@contextmanager
def kept_rows() -> Iterator[None]:
    """Statistics that are formed inside may stay ``Rows``."""
    before, _kept.on = _kept.on, True
    try:
        yield
    finally:
        _kept.on = before


def stay(rows: Tensor) -> bool:
    """Whether rows stay unmultiplied."""
    count, d = rows.shape[-2:]
    few = _kept.on and rows.dim() == 2 and count < d and d >= 2 * WIDTH * torch.get_num_threads()
    return few and rows.device.type == "cpu" and not rows.is_complex()


def second_moment(rows: Tensor, scale: float = 1.0) -> Statistic:
    """``gram``, or a copy of rows that stay: nobody knows what is done with them until then."""
    return Rows(rows.clone(), scale) if stay(rows) else gram(rows, scale)


@overload
def multiplied(statistic: Statistic) -> Tensor: ...
@overload
def multiplied(statistic: Statistic | None) -> Tensor | None: ...
def multiplied(statistic: Statistic | None) -> Tensor | None:
    """A statistic as a tensor; None as it is."""
    return statistic.product() if isinstance(statistic, Rows) else statistic


def _slabs(d: int) -> list[Range]:
    """Ranges that cover the features."""
    width = WIDTH * torch.get_num_threads()
    return [(start, min(start + width, d)) for start in range(0, d, width)]
