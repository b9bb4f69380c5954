"""Make the update of a gradient by a learning rate: KFC's stochastic form."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from kfac_fx.curvature.inverses import InverseFisher
from kfac_fx.optim.adapt_damping import DampingRule
from kfac_fx.optim.bounds import (
    LARGEST_STEP,
    LayerSteps,
    NaturalLength,
    layer_numbers,
    own_entries,
)
from kfac_fx.optim.periods import REFRESHES, is_due
from kfac_fx.optim.quadratic import Direction, inner_products
from kfac_fx.optim.updates import Situation, Update, due
from kfac_fx.parallel import ALONE


@dataclass
class ScheduledUpdate:
    """KFC's stochastic form: momentum * previous - lr * proposal, within bounds.

    Attributes:
        inverse: gives proposals.
        rule: has lambda.
        follows: whether lambda is the mean eigenvalue, taken anew at each refresh.
        refresh_every: T3; None for the library's own periods.
        trust_region: largest squared length lr^2 grad^T Fhat^-1 grad of the new part, as KFC has
            it; None for no limit.
        natural: in place of that, the bounds of ``Preconditioner``; None for KFC's own.
    """

    inverse: InverseFisher
    rule: DampingRule
    follows: bool
    refresh_every: int | None
    trust_region: float | None
    natural: NaturalLength | None
    _layers: dict[tuple[str, ...], LayerSteps] = field(default_factory=dict)

    @property
    def damping(self) -> float:
        return self.rule.total

    def __call__(self, at: Situation) -> Update:
        if self.refresh_every is None:
            refresh = is_due(at.iteration - 1, None, REFRESHES)
        else:
            refresh = due(at.iteration, self.refresh_every)
        if refresh or self.inverse.refreshed is None:
            if self.follows:
                self.rule.follow(self.inverse.mean_eigenvalue())
            self.inverse.keep_up(self.rule.total)
        proposal = self.inverse.precondition(at.gradient)
        scale = self._scale(at, proposal)
        # The previous update is written over: with momentum, no more memory than the update itself.
        step = {}
        for name, value in proposal.items():
            rate = -at.rates[name] * scale
            previous = at.previous.get(name)
            step[name] = (
                value * rate
                if previous is None
                else previous.mul_(at.momenta[name]).add_(value, alpha=rate)
            )
        if self.natural is not None:
            self._shorten(at, step)
        return Update(step, {"trust": scale})

    def _scale(self, at: Situation, proposal: Direction) -> float:
        """Return the factor of a proposal; of one that is not finite it is 1 and all is refused."""
        if self.natural is not None:
            share = self.natural.share([at.gradient[n] for n in proposal], [*proposal.values()])
            return share if math.isfinite(share) else 1.0
        if self.trust_region is None:
            return 1.0
        # The length is of the step that the learning rates of all groups make, not of the
        # proposal: a small rate needs no shortening.
        scaled = {name: at.gradient[name] * at.rates[name] ** 2 for name in proposal}
        length = float(inner_products([scaled, proposal])[0, 1])
        return min(1.0, math.sqrt(self.trust_region / max(length, 1e-300)))

    def _shorten(self, at: Situation, step: Direction) -> None:
        """Shorten the steps of layers that are too long for their weights, in place."""
        names = tuple(step)
        weights = [at.parameters[name] for name in names]
        if names not in self._layers:  # parameters may be added to a group, or frozen
            blocks = self.inverse.curvature.blocks.values()
            numbers = layer_numbers(block.parameters for block in blocks)
            self._layers[names] = LayerSteps(weights, [numbers[n] for n in names], ALONE)
        steps = [own_entries(step[name]) for name in names]
        before = [own_entries(weight) for weight in weights]
        excess = self._layers[names].excess(steps, before, LARGEST_STEP)
        for one, much in zip(steps, excess, strict=True):
            if isinstance(much, Tensor) or much > 0:
                one.mul_(1 - much)
