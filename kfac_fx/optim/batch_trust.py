"""Decide which batches an optimizer believes."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from kfac_fx.torch_internals import foreach

log = logging.getLogger("kfac_fx")

FLOOR = 1e-2
"""Losses below it are not compared: near a perfect fit a factor between them means nothing."""

WIDER = 100.0
"""Gradients vary more than losses: theirs may be this many times the outlier factor."""

BROKEN = 1e7
"""Statistics this many times as long as their averages are of broken batches, whatever the task. Of
a good fit they are the squares of small probabilities, but for a draw now and then of an unlikely
target, which alone is a million times as long: refused, the Fisher would be without its largest
part, and steps too long for the hard cases."""

SMALL = 0.25
"""Batches with a smaller share of the usual number of cases count by their share."""

PATIENCE = 10
"""Outliers before what is usual is learnt anew."""

SPARING = 0.02
"""How much of an outlier a usual batch makes up for: one in fifty is nothing to learn from, but
what is an outlier once in every epoch would be left out for ever, and the network never fit it."""


class BatchTrust:
    """Compares a batch's loss and gradient with the running averages of those that were believed.

    One mislabelled or broken batch, or a last batch of three cases, would otherwise spoil averages
    that took hundreds of batches to become good.

    Args:
        outlier: a loss is not believed above this many times the average loss.
    """

    def __init__(self, outlier: float) -> None:
        self.outlier = outlier
        self._loss: float | None = None
        self._norm: float | None = None
        self._cases: float | None = None
        self._outliers = 0.0
        self._unfit_in_row = 0
        self._last_loss = math.nan
        self._last_norm = math.nan

    def widest(self, compared: bool = True) -> float:
        """Return how many times longer than their averages statistics may be.

        After many batches in a row whose statistics were refused, the next are taken as they are:
        the network has changed, not the batches.

        Args:
            compared: whether outliers are told; else only what no good batch would have.
        """
        # Statistics of hard batches are refused one at a time, never so many in a row: where hard
        # batches are used, they would be refused for ever.
        limit = WIDER * self.outlier
        limit = limit if compared else max(limit, BROKEN)
        return limit if self._unfit_in_row < PATIENCE else math.inf

    def fitted(self, well: bool) -> None:
        """Note whether a batch's statistics were taken."""
        self._unfit_in_row = 0 if well else self._unfit_in_row + 1

    def share(self, cases: int) -> float:
        """Return how much of a step a batch is worth: below 1 where it has far fewer cases.

        What few cases do not see looks flat to the quadratic model, which then asks for a long
        step. Batches that differ a little (the last one of an epoch) count as whole ones.
        """
        share = 1.0 if self._cases is None else cases / self._cases
        return 1.0 if share > SMALL else share

    def believes(self, loss: Tensor, gradient: Collection[Tensor], compared: bool = True) -> bool:
        """Say whether loss and gradient are finite and no outliers.

        Many finite outliers are no outliers: what is usual is then learnt anew.

        Args:
            loss: [], the mean over likelihood terms.
            gradient: the gradient of every parameter.
            compared: whether finite outliers are told; else all that is finite is believed.
        """
        # They are kept for accept(): a batch counts as usual only after its statistics were taken.
        value, norm = _numbers(loss, gradient)
        self._last_loss = value
        self._last_norm = norm
        if not (math.isfinite(value) and math.isfinite(norm)):
            return False
        if not compared or self._loss is None or self._norm is None:
            return True
        # Losses may be negative (densities), so that a factor is of the absolute average.
        usual = value <= self.outlier * max(abs(self._loss), FLOOR) and (
            norm <= WIDER * self.outlier * max(self._norm, FLOOR)
        )
        self._outliers = max(0.0, self._outliers - SPARING) if usual else self._outliers + 1
        if self._outliers >= PATIENCE:
            self._loss = None
            self._norm = None
            self._outliers = 0.0
            return True
        return usual

    def grew(self, before: float, after: float) -> bool:
        """Say whether a step made the same batch's loss an outlier, or not finite."""
        # "not <" rather than ">=": a loss that is not a number has grown too much.
        limit = (self.outlier - 1) * max(abs(before), FLOOR)
        return math.isfinite(before) and not after - before < limit

    def accept(self, cases: int) -> None:
        """Take the last batch that was believed into the averages; it had so many cases."""
        self._loss = _mixed(self._loss, self._last_loss)
        self._norm = _mixed(self._norm, self._last_norm)
        self._cases = _mixed(self._cases, float(cases))

    def state(self) -> list[float | None]:
        """Return the averages and counts as plain values."""
        return [self._loss, self._norm, self._cases, self._outliers, self._unfit_in_row]

    def load(self, state: Sequence[float | None]) -> None:
        """Restore ``state``."""
        loss, norm, cases, outliers, unfit = state
        self._loss = loss
        self._norm = norm
        self._cases = cases
        self._outliers = float(outliers or 0)
        self._unfit_in_row = int(unfit or 0)


def warn_rarely(count: int, text: str, *values: object) -> None:
    """Log what has happened so often: as a warning the 1st, 2nd, 4th, 8th, ... time.

    Args:
        count: how often, this time included.
        text: the message, for ``values``.
        values: what is put into the text.
    """
    # A warning a batch hides all others in a long run; none at all hides that batches are lost.
    level = logging.WARNING if count & (count - 1) == 0 else logging.DEBUG
    log.log(level, text + " (%d times so far)", *values, count)


def _mixed(old: float | None, new: float) -> float:
    """Return a running average in which no batch counts as more than twice the usual."""
    return new if old is None else 0.9 * old + 0.1 * min(new, 2 * abs(old))


def _numbers(loss: Tensor, gradient: Collection[Tensor]) -> tuple[float, float]:
    """Return the loss and the norm of the gradient; a GPU is waited for once, not twice."""
    found = foreach.norm(list(gradient))
    same = len({norm.dtype for norm in found}) == 1
    norms = torch.stack(found if same else [norm.double() for norm in found]).double()
    value, norm = torch.stack([loss.double(), norms.norm()]).tolist()
    return value, norm
