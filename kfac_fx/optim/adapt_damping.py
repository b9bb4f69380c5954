"""Adapt lambda and gamma (Martens & Grosse 2015, sections 6.5 and 6.6).

The formulas are in docs/explanation/mathematics.md, section 9.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from kfac_fx.errors import DampingError

LARGEST = 1e4
"""How many times its first value lambda can become."""


class DampingRule:
    """lambda by the reduction ratio, gamma by greedy search.

    Two numbers, because they serve two purposes: lambda says how far the quadratic model is
    believed, gamma what keeps the factors invertible. The paper found that a gamma tied to lambda
    is often too large.

    Args:
        damping: lambda_0, above zero, in the units of the Fisher of one likelihood term.
        weight_decay: eta, which the model adds to lambda.
        smallest: floor of lambda; gamma stays above sqrt(smallest + eta).
        gamma_limit: gamma stays below this multiple of sqrt(lambda + eta).
        damping_every: T1; a judgement changes lambda by omega1 = (19/20)^T1, so that its speed does
            not depend on T1.
        gamma_every: T2; neighbours of gamma lie omega2 = (19/20)^(T2 / 2) away.

    Attributes:
        damping: lambda now.
        gamma: gamma of factored Tikhonov damping now; starts as sqrt(lambda_0 + eta).

    Raises:
        DampingError: damping is not a finite number above zero.
    """

    def __init__(
        self,
        damping: float,
        weight_decay: float,
        smallest: float,
        gamma_limit: float,
        damping_every: int,
        gamma_every: int,
    ) -> None:
        if not (math.isfinite(damping) and damping > 0):
            raise DampingError(f"damping must be a finite number above zero, got {damping!r}")
        self.damping = damping
        self.weight_decay = weight_decay
        self.smallest = smallest
        self.damping_every = damping_every
        self.gamma_every = gamma_every
        self.gamma_limit = gamma_limit
        self.gamma: float = self.total**0.5
        self._largest = LARGEST * damping
        self._omega1 = (19 / 20) ** damping_every
        self._omega2 = (19 / 20) ** (gamma_every / 2)

    @property
    def total(self) -> float:
        """Return lambda + eta, which the quadratic model adds to the diagonal of F."""
        return self.damping + self.weight_decay

    def candidates(self, iteration: int) -> list[float]:
        """Return gamma, and every T2 iterations its neighbours too; all within the limits."""
        # The ceiling may lie below the floor while lambda is small: then the floor counts, as too
        # little damping gives steps of any size and too much only short ones.
        floor = (self.smallest + self.weight_decay) ** 0.5
        ceiling = max(self.gamma_limit * self.total**0.5, floor)
        found = [self.gamma]
        if iteration % self.gamma_every == 0:
            found += [self.gamma * self._omega2, self.gamma / self._omega2]
        # At a limit two candidates become one, which is not worth a second refresh.
        return list(dict.fromkeys(min(max(gamma, floor), ceiling) for gamma in found))

    def choose(self, gamma: float) -> None:
        """Take the candidate whose model was lowest."""
        self.gamma = gamma

    def judge(self, change: float, predicted: float) -> float:
        """Return rho, the change of the objective over the model's; lambda follows it.

        Args:
            change: objective after the step less before, on the same cases.
            predicted: the model's value at the step, not positive.
        """
        # Between 1/4 and 3/4 the model is as good as it need be, and lambda stays.
        rho = change / predicted if predicted else 1.0
        if rho > 3 / 4:
            self.damping = max(self.damping * self._omega1, self.smallest)
        elif rho < 1 / 4:
            self.damping = min(self.damping / self._omega1, self._largest)
        return rho

    def rejected(self) -> None:
        """Raise lambda and gamma after a step that was undone."""
        # Both: a step that made the loss explode was too long whichever of them let it.
        self.damping = min(self.damping / self._omega1, self._largest)
        self.gamma = min(self.gamma / self._omega2, self._largest**0.5)

    def state(self) -> dict[str, float]:
        """Return lambda and gamma."""
        return {"damping": self.damping, "gamma": self.gamma}

    def load(self, state: Mapping[str, float]) -> None:
        """Restore ``state``."""
        self.damping = float(state["damping"])
        self.gamma = float(state["gamma"])
