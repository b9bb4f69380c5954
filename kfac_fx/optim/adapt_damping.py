"""Adapt lambda and gamma (Martens & Grosse 2015, sections 6.5 and 6.6).

The formulas are in docs/explanation/mathematics.md, section 9.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from kfac_fx.errors import DampingError
from kfac_fx.optim.kfac_options import KFACOptions

LARGEST = 1e4
"""How many times its first value lambda can become by the ratio."""

FLOOR = 1e-12
"""Of lambda, in mean eigenvalues of the curvature, where no number is given."""

GOOD = 3 / 4
POOR = 1 / 4
"""Reduction ratios above and below which the quadratic model is believed more, or less."""


class DampingRule:
    """lambda by the reduction ratio of a step's own batch, gamma tied to it or searched.

    Two numbers, because they serve two purposes: lambda says how far the quadratic model is
    believed, gamma what keeps the factors invertible. The paper found that a gamma tied to lambda
    is often too large, and searches it.

    Args:
        damping: lambda_0, above zero, in the units of the Fisher of one likelihood term. None for
            the first mean eigenvalue that ``scaled`` is told.
        weight_decay: eta, which the model adds to lambda.
        options: T1, T2, omega1, omega2 and the limits of lambda and gamma.

    Attributes:
        damping: lambda now; 1.0 where it has not been found yet.
        mean: the mean eigenvalue of the curvature at the last refresh; 0 before.

    Raises:
        DampingError: damping is not a finite number above zero.
    """

    def __init__(self, damping: float | None, weight_decay: float, options: KFACOptions) -> None:
        if damping is not None and not (math.isfinite(damping) and damping > 0):
            raise DampingError(f"damping must be a finite number above zero, got {damping!r}")
        self.damping = damping or 1.0
        self.weight_decay = weight_decay
        self.mean = 0.0
        self._found = damping is not None
        self._first = self.damping
        self._smallest = options.smallest_damping
        self._gamma_limit = options.gamma_limit
        self._every = options.damping_every or 1
        self._gamma_every = options.gamma_every
        self._gamma: float = self.total**0.5
        self._omega1 = options.omega1 or (19 / 20) ** self._every
        self._omega2 = options.omega2 or (19 / 20) ** ((options.gamma_every or 0) / 2)

    @property
    def total(self) -> float:
        """Return lambda + eta, which the quadratic model adds to the diagonal of F."""
        return self.damping + self.weight_decay

    @property
    def gamma(self) -> float:
        """Return gamma of factored Tikhonov damping; a search has moved it since lambda_0."""
        return self._gamma if self._gamma_every else self.total**0.5

    @property
    def floor(self) -> float:
        """Return the least that lambda becomes."""
        return FLOOR * self.mean if self._smallest is None else self._smallest

    def follow(self, mean: float) -> None:
        """Take the mean eigenvalue of the curvature for lambda, where that has no rule."""
        self.mean = mean
        self.damping = mean

    def scaled(self, mean: float) -> None:
        """Note the mean eigenvalue of the curvature; the first is lambda_0 where none is given."""
        self.mean = mean
        if not self._found:
            self._found = True
            self._first = mean
            self.damping = mean
            self._gamma = self.total**0.5

    def due(self, iteration: int) -> bool:
        """Say whether the step of an iteration is judged on its own batch: every T1 are."""
        return iteration % self._every == 0

    def candidates(self, iteration: int) -> list[float]:
        """Return gamma, and every T2 iterations its neighbours too; all within the limits."""
        if not self._gamma_every:
            return [self.gamma]
        # The ceiling may lie below the floor while lambda is small: then the floor counts, as too
        # little damping gives steps of any size and too much only short ones.
        floor = (self.floor + self.weight_decay) ** 0.5
        ceiling = max(self._gamma_limit * self.total**0.5, floor)
        found = [self._gamma]
        if iteration % self._gamma_every == 0:
            found += [self._gamma * self._omega2, self._gamma / self._omega2]
        # At a limit two candidates become one, which is not worth a second refresh.
        return list(dict.fromkeys(min(max(gamma, floor), ceiling) for gamma in found))

    def choose(self, gamma: float) -> None:
        """Take the candidate whose model was lowest."""
        self._gamma = gamma

    def judge(self, change: float, predicted: float) -> float:
        """Return rho, the change of the objective over the model's; lambda follows it.

        Args:
            change: objective after the step less before, on the same cases.
            predicted: the model's value at the step, not positive.
        """
        # Between 1/4 and 3/4 the model is as good as it need be, and lambda stays.
        rho = change / predicted if predicted else 1.0
        if rho > GOOD:
            self.damping = max(self.damping * self._omega1, self.floor)
        elif rho < POOR:
            self.damping = min(self.damping / self._omega1, self.largest)
        return rho

    @property
    def largest(self) -> float:
        """Return the most that lambda becomes by the ratio."""
        return LARGEST * self._first

    def rejected(self) -> None:
        """Raise lambda and gamma after a step that was undone."""
        # Both: a step that made the loss explode was too long whichever of them let it.
        self.damping = min(self.damping / self._omega1, self.largest)
        self._gamma = min(self._gamma / self._omega2, self.largest**0.5)

    def numbers(self) -> dict[str, float]:
        """Return lambda and gamma, for the diagnostics."""
        return {"damping": self.damping, "gamma": self.gamma}

    def state(self) -> dict[str, float]:
        """Return all that a resumed run needs."""
        own = {"mean": self.mean, "first": self._first, "found": float(self._found)}
        return {**self.numbers(), **own}

    def load(self, state: Mapping[str, float]) -> None:
        """Restore ``state``."""
        self.damping = float(state["damping"])
        self._gamma = float(state["gamma"])
        self.mean = float(state["mean"])
        self._first = float(state["first"])
        self._found = bool(state["found"])
