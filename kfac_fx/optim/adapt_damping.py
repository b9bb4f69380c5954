"""How lambda and gamma adapt (Martens & Grosse 2015, sections 6.5 and 6.6)."""

from __future__ import annotations

import math
from typing import Any

from kfac_fx.errors import DampingError

LARGEST = 1e4
"""How many times lambda_0 lambda can become."""


class DampingRule:
    """lambda by the reduction ratio, gamma by greedy search.

    Args:
        damping: lambda_0.
        weight_decay: eta.
        smallest: floor of lambda; gamma stays above sqrt(smallest + eta).
        gamma_limit: gamma stays below this multiple of sqrt(lambda + eta).
        damping_every, gamma_every: T1 and T2; omega1 = (19/20)^T1, omega2 = (19/20)^(T2 / 2).

    Attributes:
        damping: lambda.
        gamma: of factored Tikhonov damping; starts as sqrt(lambda_0 + eta).

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
        self.damping, self.weight_decay, self.smallest = damping, weight_decay, smallest
        self.damping_every, self.gamma_every = damping_every, gamma_every
        self.gamma_limit = gamma_limit
        self.gamma: float = self.total**0.5
        self._largest = LARGEST * damping
        self._omega1 = (19 / 20) ** damping_every
        self._omega2 = (19 / 20) ** (gamma_every / 2)

    @property
    def total(self) -> float:
        """lambda + eta."""
        return self.damping + self.weight_decay

    def candidates(self, iteration: int) -> list[float]:
        """gamma, and every T2 iterations its neighbours; all within the limits."""
        floor = (self.smallest + self.weight_decay) ** 0.5
        ceiling = max(self.gamma_limit * self.total**0.5, floor)
        found = [self.gamma]
        if iteration % self.gamma_every == 0:
            found += [self.gamma * self._omega2, self.gamma / self._omega2]
        return list(dict.fromkeys(min(max(gamma, floor), ceiling) for gamma in found))

    def judge(self, change: float, predicted: float) -> float:
        """rho = change of the objective over the model's; lambda follows. Returns rho."""
        rho = change / predicted if predicted else 1.0
        if rho > 3 / 4:
            self.damping = max(self.damping * self._omega1, self.smallest)
        elif rho < 1 / 4:
            self.damping = min(self.damping / self._omega1, self._largest)
        return rho

    def rejected(self) -> None:
        """lambda and gamma grow after a step that was undone."""
        self.damping = min(self.damping / self._omega1, self._largest)
        self.gamma = min(self.gamma / self._omega2, self._largest**0.5)

    def state(self) -> dict[str, Any]:
        """Plain values."""
        return {"damping": self.damping, "gamma": self.gamma}

    def load(self, state: dict[str, Any]) -> None:
        """Restores ``state``."""
        self.damping, self.gamma = float(state["damping"]), float(state["gamma"])
