"""Adapt lambda by what a step did to its own batch and to the next one, which it has not seen.

The rule is derived in docs/explanation/mathematics.md, section 9.
"""

from __future__ import annotations

from collections.abc import Mapping

from kfac_fx.optim.adapt_damping import GOOD, POOR, DampingRule
from kfac_fx.optim.kfac_options import KFACOptions

AGREE = 0.45
DIFFER = -0.2
"""Average held-out ratios above and below which batches agree about a step, or contradict it."""

MEMORY = 0.9
"""The weight of the old in the average held-out ratio."""

WIDEST = 2.0
"""A held-out ratio counts as at most this: one hard case can make it any number."""

SHORTEST = 0.3
"""The least fraction of its best step that is made, however noisy batches are."""

HARM = -0.05
"""Average held-out ratio below which steps are shortened further."""

CEILING = 100.0
"""Up to so many mean eigenvalues lambda grows because batches contradict each other."""

FURTHEST = 1e12
"""Up to so many mean eigenvalues lambda grows because steps raise their own batch's loss."""

NOISY = 0.7
"""Average signal below which steps of the quadratic model fit noise, and a rate is better."""

LEARNT, SLOW = 10, 0.1
"""Judgements after which lambda has been found; and the average part of the loss that a step of the
model has to take away then, to be worth as much as the five or so cheap steps of its time. Not
where batches are all the cases: there the model's steps get better the closer they come."""

TRANSFER, FALLS = 0.1, 0.03
"""Average held-out ratio, and average part of the loss that a step takes away, below which steps
with the exact Fisher of their batch fit noise. They take away much of a batch's loss at once, and
little of that counts for the next one even without noise; but then the loss goes on falling."""

FOLLOWS = 0.8
"""Average held-out ratio of the first of these steps on plain batches, below which cases are drawn
of a data set: each step would fit its own. Walkers follow the wave function, and theirs is above
one."""

RESTS = 0.15
"""Average own ratio below which changes are those of rounding: nothing is left to take away, and
steps with a rate might lose the fit."""

RIGHT = (GOOD, 1.15)
"""Average own ratios of a model that is right: there is no better step than its own."""

SAME = 1e-2
"""Largest difference of both ratios of a step, by rounding, where batches are all the cases."""

MOSTLY = 0.5
"""Average from which batches count as other ones each time."""

GAIN_MEMORY = 0.8
"""The weight of the old in the averages of those parts, and of batches that were others."""

RAISE = 4.0
FIRST_RAISE = 10.0
"""How many times as much lambda is for the next try, after a step that raised the loss."""


class HeldOutRule(DampingRule):
    """lambda by two ratios of each step; gamma as ``DampingRule`` has it.

    The ratio on the step's own batch says whether the model is right, that on the next batch
    whether what was fitted is more than this batch's noise. Where batches are all the cases, both
    are the same, and lambda follows fast; small batches hold it up, and let it grow to the scale of
    the curvature.

    Attributes:
        fraction: the part of its best step that is made.
        exact: whether steps have the exact Fisher of their batch, as all batches had few rows.
        plain: whether these were plain batches, of no equation.
    """

    def __init__(self, damping: float | None, weight_decay: float, options: KFACOptions) -> None:
        super().__init__(damping, weight_decay, options)
        self._omega1 = options.omega1 or 0.7
        # What the last step promised, and its own ratio, until the next batch has judged it.
        self._predicted = 0.0
        self._own = 1.0
        self.fraction = 1.0
        self._average = 0.0
        self._signal = 1.0
        self._judged = 0
        self._gain = 1.0
        self._differ = 0.0
        self._own_average = 1.0
        self.exact = False
        self.plain = False

    @property
    def largest(self) -> float:
        return FURTHEST * (self.mean or self._first)

    def due(self, iteration: int) -> bool:
        return True

    def judge(self, change: float, predicted: float) -> float:
        self._predicted = predicted
        self._own = change / predicted if predicted else 1.0
        return self._own

    def judge_held_out(self, change: float, before: float) -> float:
        """Return the ratio of the last step on a batch that it has not seen; lambda follows it.

        Args:
            change: objective after the step less before, on the present batch.
            before: the objective before it.
        """
        # Of an objective that is not positive no part is known; one step more or less is no matter.
        part = min(max(-change / before, -1.0), 1.0) if before > 0 else 0.0
        self._gain = GAIN_MEMORY * self._gain + (1 - GAIN_MEMORY) * part
        if not self._predicted:
            return 1.0
        ratio = min(max(change / self._predicted, -WIDEST), WIDEST)
        differ = abs(change / self._predicted - self._own) > SAME * max(1.0, abs(self._own))
        self._differ = GAIN_MEMORY * self._differ + (1 - GAIN_MEMORY) * differ
        own = min(max(self._own, -WIDEST), WIDEST)
        self._own_average += (1 - GAIN_MEMORY) * (own - self._own_average)
        # The average of ratios and not the ratio of averages: early steps promise thousands of
        # times as much as late ones, and would be all that the latter remembers.
        self._judged += 1
        new = max(1 - MEMORY, 1 / self._judged)
        self._average += new * (ratio - self._average)
        self.damping = min(max(self.damping * self._factor(ratio), self.floor), self.largest)
        # What the own batch gained and this one did not is noise, however wrong the model is.
        noise = min(max(self._own - change / self._predicted, -WIDEST), WIDEST)
        signal = 1 - noise * (1 - 0.5 * self.fraction)
        self._signal += new * (signal - self._signal)
        # Steps that do harm at the floor are shortened below it.
        floor = SHORTEST if self._average > HARM else SHORTEST / 3
        # Steps that begin with those of other batches find their length by lambda alone.
        self.fraction = 1.0 if self.exact else min(max(self._signal, floor), 1.0)
        self._predicted = 0.0
        return ratio

    @property
    def differs(self) -> bool:
        """Say whether batches are other cases each time."""
        return self._differ > MOSTLY

    @property
    def rests(self) -> bool:
        """Say whether what steps change is rounding, as nothing is left to take away."""
        return self._own_average <= RESTS

    @property
    def is_right(self) -> bool:
        """Say whether steps do what the model says."""
        return RIGHT[0] <= self._own_average <= RIGHT[1]

    def pause(self) -> None:
        """Note that the next steps are none of the model's, and judge none of them."""
        self._predicted = 0.0

    @property
    def why_not(self) -> str | None:
        """Return why steps of the quadratic model are not worth their time; None if they are."""
        learnt = self._judged >= LEARNT
        if self.exact:
            if self.plain and self.differs and not learnt and self._average < FOLLOWS:
                return "batches disagree"
            fits_noise = self._average < TRANSFER and self._gain < FALLS
            return "batches disagree" if learnt and self.differs and fits_noise else None
        if self._judged >= 3 and self._signal < NOISY:
            return "batches disagree"
        # Cases that are chosen anew every now and then (points of an equation) are all the cases.
        if self.differs and learnt and self._gain < SLOW:
            return "the loss falls slowly"
        return None

    def _factor(self, ratio: float) -> float:
        fast, slow = self._omega1, self._omega1 ** (1 / 3)
        ceiling = CEILING * self.mean
        if self._own < POOR:
            return 1 / fast
        if self._average < DIFFER:
            # Noise never goes away by damping alone: beyond the ceiling steps only get slower.
            return 1 / slow if self.damping < ceiling else 1.0
        if self._own < GOOD:
            return 1.0
        if self._average > AGREE and ratio > POOR:
            return fast
        # Above the ceiling only steps that failed took it, and it comes back from there.
        return slow if self._average > POOR or self.damping > ceiling else 1.0

    def raised(self, first: bool) -> None:
        """Raise lambda for another try of a step that raised its own batch's loss.

        Args:
            first: whether it is the first step of a run, whose lambda nothing has tested yet.
        """
        self.damping = min(self.damping * (FIRST_RAISE if first else RAISE), self.largest)

    def settle(self, before: float) -> None:
        """Take back half of what failed tries have added, now that one of them was good.

        Args:
            before: lambda before the first of them.
        """
        # One batch asked for it; if it was not the batch's fault alone, the next one asks again.
        self.damping = (before * self.damping) ** 0.5

    def rejected(self) -> None:
        self.damping = min(self.damping * RAISE, self.largest)
        self._predicted = 0.0

    def numbers(self) -> dict[str, float]:
        return {**super().numbers(), "held_out": self._average, "fraction": self.fraction}

    def state(self) -> dict[str, float]:
        own = {"predicted": self._predicted, "own": self._own, "signal": self._signal}
        own |= {"gain": self._gain, "differ": self._differ, "own_average": self._own_average}
        own |= {"judged": float(self._judged), "exact": float(self.exact)}
        own |= {"plain": float(self.plain)}
        return {**super().state(), **own}

    def load(self, state: Mapping[str, float]) -> None:
        super().load(state)
        self.fraction = float(state["fraction"])
        self._average = float(state["held_out"])
        self._signal = float(state["signal"])
        self._predicted = float(state["predicted"])
        self._own = float(state["own"])
        self._judged = int(state["judged"])
        self._gain = float(state.get("gain", 1.0))  # earlier states have none
        self._differ = float(state.get("differ", 0.0))
        self._own_average = float(state.get("own_average", 1.0))
        self.exact = bool(state.get("exact", False))
        self.plain = bool(state.get("plain", False))
