"""Which batches an optimizer believes."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

FLOOR = 1e-2
"""Losses below it are not compared: near a perfect fit a factor between them means nothing."""

WIDER = 100.0
"""Gradients vary more than losses: theirs may be this many times the outlier factor."""

SMALL = 0.25
"""Batches with a smaller share of the usual number of cases count by their share."""

PATIENCE = 10
"""Batches in a row that are outliers before what is usual is learnt anew."""


class BatchTrust:
    """Compares a batch's loss and gradient with the running averages of those that were believed.

    Args:
        outlier: the factor above which a loss is not believed.
    """

    def __init__(self, outlier: float) -> None:
        self.outlier = outlier
        self._loss: float | None = None
        self._norm: float | None = None
        self._cases: float | None = None
        self._streak = self._unfit = 0
        self._last = (math.nan, math.nan)

    @property
    def widest(self) -> float:
        """How many times longer than their averages statistics may be.

        After many in a row that were no good the next are taken as they are.
        """
        return WIDER * self.outlier if self._unfit < PATIENCE else math.inf

    def fitted(self, well: bool) -> None:
        """Notes whether a batch's statistics were taken."""
        self._unfit = 0 if well else self._unfit + 1

    def share(self, cases: int) -> float:
        """How much of a step a batch is worth: less than one where it has far fewer cases.

        What few cases do not see looks flat to the quadratic model.
        """
        share = 1.0 if self._cases is None else cases / self._cases
        return 1.0 if share > SMALL else share

    def believes(self, loss: Tensor, gradient: Collection[Tensor]) -> bool:
        """Whether both are finite and no outliers.

        Many finite outliers in a row are no outliers: what is usual is then learnt anew.
        """
        value, norm = self._last = _numbers(loss, gradient)
        if not (math.isfinite(value) and math.isfinite(norm)):
            return False
        if self._loss is None or self._norm is None:
            return True
        usual = value <= self.outlier * max(abs(self._loss), FLOOR) and (
            norm <= WIDER * self.outlier * max(self._norm, FLOOR)
        )
        self._streak = 0 if usual else self._streak + 1
        if self._streak >= PATIENCE:
            self._loss = self._norm = None
            return True
        return usual

    def grew(self, before: float, after: float) -> bool:
        """Whether a step made the same batch's loss an outlier, or not finite."""
        limit = (self.outlier - 1) * max(abs(before), FLOOR)
        return math.isfinite(before) and not after - before < limit

    def accept(self, cases: int) -> None:
        """Takes the last batch that was believed into the averages."""
        value, norm = self._last
        self._streak = 0
        self._loss = _mixed(self._loss, value)
        self._norm = _mixed(self._norm, norm)
        self._cases = _mixed(self._cases, float(cases))

    def state(self) -> list[Any]:
        """Plain values."""
        return [self._loss, self._norm, self._cases, self._streak, self._unfit]

    def load(self, state: list[Any]) -> None:
        """Restores ``state``."""
        self._loss, self._norm, self._cases, self._streak, self._unfit = state


def _mixed(old: float | None, new: float) -> float:
    """A running average in which no single batch counts as more than twice the usual."""
    return new if old is None else 0.9 * old + 0.1 * min(new, 2 * abs(old))


def _numbers(loss: Tensor, gradient: Collection[Tensor]) -> tuple[float, float]:
    """The loss and the norm of the gradient, with one synchronisation."""
    norms = torch.stack([norm.double() for norm in torch._foreach_norm(list(gradient))])
    value, norm = torch.stack([loss.double(), norms.square().sum().sqrt()]).tolist()
    return value, norm
