"""The two forms of ``KFAC``: by the quadratic model, or by a learning rate; and when it changes."""

from __future__ import annotations

from dataclasses import dataclass

from kfac_fx.curvature.inverses import InverseFisher
from kfac_fx.errors import UnknownOptionError
from kfac_fx.optim.adapt_damping import DampingRule
from kfac_fx.optim.bounds import AdaptiveLength, LayerBounds
from kfac_fx.optim.held_out import HeldOutRule
from kfac_fx.optim.kfac_options import KFACOptions
from kfac_fx.optim.objective import Objective
from kfac_fx.optim.updates import AdaptiveUpdate, ScheduledUpdate, UpdateRule
from kfac_fx.parallel import ALONE, Workers

RATE = 0.1
"""The learning rate of the stochastic form where nobody gave one."""


@dataclass(frozen=True)
class Form:
    """How iterations go from a batch to a step.

    Attributes:
        rule: has lambda and gamma.
        make: makes the update.
        length: says how long proposals are; None where the model does, or the user's trust region.
        statistics_every: period of the statistics; None for ours.
        statistics_fraction: share of a batch that statistics are of.
        ema_decay: largest weight of the old statistics.
        scheduled: whether it is the stochastic form.
    """

    rule: DampingRule
    make: UpdateRule
    length: AdaptiveLength | None
    statistics_every: int | None
    statistics_fraction: float
    ema_decay: float
    scheduled: bool

    @property
    def held_out(self) -> HeldOutRule | None:
        """Return the rule if it judges steps on batches that these have not seen."""
        return self.rule if isinstance(self.rule, HeldOutRule) else None


@dataclass(frozen=True)
class Forms:
    """Makes a form from what the user has given.

    Attributes:
        inverse, objective, workers, options: the optimizer's.
        damping, weight_decay, statistics_every, refresh_every: arguments of ``KFAC``.
    """

    inverse: InverseFisher
    objective: Objective
    workers: Workers
    options: KFACOptions
    damping: float | None
    weight_decay: float
    statistics_every: int | None
    refresh_every: int | None

    def adaptive(self) -> Form:
        """Return the form whose steps minimise the quadratic model.

        Raises:
            UnknownOptionError: inverses come into use later than they are made.
        """
        options = self.options
        if self.workers.staleness:
            raise UnknownOptionError("stale inverses need an lr: without, gamma is searched")
        kind = HeldOutRule if options.damping_every is None else DampingRule
        rule = kind(self.damping, self.weight_decay, options)
        every = options.gamma_every or 5 if self.refresh_every is None else self.refresh_every
        make = AdaptiveUpdate(
            self.objective,
            self.inverse,
            rule,
            options.products_fraction,
            options.fewest_products,
            every,
            self.workers,
        )
        return Form(
            rule,
            make,
            None,
            1 if self.statistics_every is None else self.statistics_every,
            options.statistics_fraction or 1 / 4,
            0.95 if options.ema_decay is None else options.ema_decay,
            scheduled=False,
        )

    def scheduled(self, rate: float = 1.0) -> Form:
        """Return KFC's stochastic form.

        Args:
            rate: the learning rate, in units of those of the groups.
        """
        options = self.options
        region = options.trust_region
        rule = DampingRule(self.damping, self.weight_decay, options)
        length = AdaptiveLength() if isinstance(region, str) else None
        layers = [block.parameters for block in self.inverse.curvature.blocks.values()]
        make = ScheduledUpdate(
            self.inverse,
            rule,
            self.damping is None,
            self.refresh_every,
            trust_region=None if isinstance(region, str) else region,
            length=length,
            layers=LayerBounds(layers, ALONE),
            rate=rate,
        )
        return Form(
            rule,
            make,
            length,
            self.statistics_every,
            options.statistics_fraction or 1.0,
            0.9 if options.ema_decay is None else options.ema_decay,
            scheduled=True,
        )
