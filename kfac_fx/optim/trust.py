"""Which batches an optimizer believes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from kfac_fx.optim.averages import all_finite

FLOOR = 1e-2
"""Losses below it are not compared: near a perfect fit a factor between them means nothing."""


class BatchTrust:
    """Compares a batch's loss with the running average of those that were believed.

    Args:
        outlier: the factor above which a batch is not believed.
    """

    def __init__(self, outlier: float) -> None:
        self.outlier = outlier
        self.average: float | None = None

    def believes(self, loss: Tensor, gradient: Iterable[Tensor] = ()) -> bool:
        """Whether all is finite, and the loss is no outlier."""
        if not all_finite([loss, *gradient]):
            return False
        return self.average is None or float(loss) <= self.outlier * max(abs(self.average), FLOOR)

    def grew(self, before: float, after: float) -> bool:
        """Whether a step made the same batch's loss an outlier, or not finite."""
        return math.isfinite(before) and not after - before < (self.outlier - 1) * max(
            abs(before), FLOOR
        )

    def accept(self, loss: float) -> None:
        """Takes a loss into the average."""
        self.average = loss if self.average is None else 0.9 * self.average + 0.1 * loss
