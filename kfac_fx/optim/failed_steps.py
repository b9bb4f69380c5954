"""Tell which steps of ``KFAC`` that were put back or undone are worth a warning, or a change."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from kfac_fx.optim.batch_trust import warn_rarely

log = logging.getLogger("kfac_fx")

TRIES = 4
"""How many steps are tried on a batch whose loss they raise, each with more damping."""

EARLY = 10
"""In so many first iterations steps are put back because lambda is still searched for."""

HARMLESS = 1e-6
"""Steps that raise a loss by less than this share of the first one, or of itself, do so by
rounding. Measured on fitted networks in float32: up to 4e-9 of the first loss."""

STUCK = 3
"""Batches in a row without a step, after which lambda is not going to find one: it has grown 1e7
times. A network that is sure of what is wrong has next to no Fisher, of which lambda is a multiple;
only its gradient says what to do."""


class FailedSteps:
    """Counts the steps of the quadratic model that were no good, and says what they mean."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._in_row = 0
        self._told = 0
        self._harmless = False

    def made(self) -> None:
        """Note that a step has lowered the loss of its batch."""
        self._in_row = 0

    def raised(self, before: float, after: float) -> None:
        """Note that a step has raised the loss of its batch."""
        size = max(abs(before), abs(before if self._first is None else self._first))
        # "<=" is not true of a loss that is not a number.
        self._harmless = after - before <= HARMLESS * size

    def begin(self, loss: float) -> None:
        """Note the objective where a step begins; later ones are compared with the first."""
        if self._first is None and math.isfinite(loss):
            self._first = loss

    def none_made(self, iteration: int) -> bool:
        """Say that no step was made on a batch; return whether the last few batches had none.

        Args:
            iteration: the number of the iteration, from 1.
        """
        why = f"{TRIES} steps raised the loss of their own batch, none is made"
        self.tell(iteration, why, quiet=self._harmless or iteration <= EARLY)
        # A fit to the last digit has no better step, and is not stuck.
        self._in_row = 0 if self._harmless else self._in_row + 1
        return self._in_row >= STUCK

    def tell(self, iteration: int, why: str, quiet: bool) -> None:
        """Log a step that was undone or not made.

        Args:
            iteration: the number of the iteration, from 1.
            why: what happened.
            quiet: whether it is nothing to worry about.
        """
        if quiet:
            log.debug("iteration %d: %s", iteration, why)
        else:
            self._told += 1
            warn_rarely(self._told, "iteration %d: %s", iteration, why)

    def state(self) -> list[float | None]:
        """Return all that a resumed run needs."""
        return [self._first, float(self._in_row), float(self._told)]

    def load(self, state: Sequence[float | None]) -> None:
        """Restore ``state``."""
        first, in_row, told = state
        self._first = first
        self._in_row = int(in_row or 0)
        self._told = int(told or 0)
