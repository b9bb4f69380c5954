"""Make the update of a gradient: by the quadratic model (K-FAC), or a learning rate (KFC).

``Forms`` puts together what goes with either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kfac_fx.codegen.refresh_module import Refreshed
from kfac_fx.config import Structure
from kfac_fx.curvature.estimate import DECAY, REFRESHES, STATISTICS, is_due
from kfac_fx.curvature.inverses import InverseFisher
from kfac_fx.curvature.mean_eigenvalue import NOTHING_LAGS
from kfac_fx.errors import UnknownOptionError
from kfac_fx.likelihoods.named import is_quadratic
from kfac_fx.optim.adapt_damping import DampingRule
from kfac_fx.optim.bounds import AdaptiveLength
from kfac_fx.optim.few_rows import FewRows
from kfac_fx.optim.held_out import HeldOutRule
from kfac_fx.optim.kfac_options import KFACOptions
from kfac_fx.optim.layer_bounds import LayerBounds
from kfac_fx.optim.objective import Batch, Objective
from kfac_fx.optim.products import Direction, products_or_reason
from kfac_fx.optim.quadratic import QuadraticModel, combination, inner_products
from kfac_fx.optim.situation import Situation, Update
from kfac_fx.optim.taken_step import LARGEST_STEP
from kfac_fx.parallel import ALONE, Workers

RATE = 0.1
"""The learning rate of the stochastic form where nobody gave one."""


class UpdateRule(Protocol):
    """Makes the update of one iteration."""

    @property
    def damping(self) -> float:
        """Return gamma^2 of factored Tikhonov damping, as the next refresh takes it."""

    def __call__(self, at: Situation) -> Update:
        """Return the update.

        Raises:
            NoProductsError: it takes products with the exact Fisher, and there are none.
        """


def due(iteration: int, every: int) -> bool:
    """Say whether a refresh is due: in the first three iterations, and every so many (T3)."""
    # The first averages change much from one batch to the next; later ones hardly do.
    return iteration <= 3 or iteration % every == 0


@dataclass(frozen=True)
class _Candidate:
    """A gamma with its proposal, and the inverses that made it."""

    gamma: float
    proposal: Direction
    refreshed: Refreshed | None


@dataclass(frozen=True)
class AdaptiveUpdate:
    """Algorithm 2 of the paper: the gamma of the lowest model, and the model's own alpha and mu.

    See docs/explanation/mathematics.md, section 9.

    Attributes:
        objective: gives products with the exact Fisher.
        inverse: gives proposals.
        rule: has lambda and gamma; it is told which gamma was best.
        fraction: tau2, the share of the batch for products with the exact Fisher.
        fewest: so many cases are taken for products at least.
        refresh_every: T3.
        workers: the processes over which those products are added up.
        rows: makes steps with the Fisher itself, of batches with few rows; None for never.
    """

    objective: Objective
    inverse: InverseFisher
    rule: DampingRule
    fraction: float
    fewest: int
    refresh_every: int
    workers: Workers
    rows: FewRows | None

    @property
    def damping(self) -> float:
        return self.rule.gamma * self.rule.gamma

    def __call__(self, at: Situation) -> Update:
        # Statistics are recorded all the same: a rate that follows would have those of the first
        # batch alone, which take its first steps far away.
        if self.rows is not None and self.rows.serve and (made := self.rows.make(at)):
            return made
        candidates = self._candidates(at)
        previous = [at.previous] if at.previous else []
        # All products with F in one go: candidates share those of the previous update.
        gram = self._gram(at, [c.proposal for c in candidates] + previous)
        at_previous = list(range(len(candidates), len(candidates) + len(previous)))
        best, lowest, weights = candidates[0], float("inf"), [1.0]
        for index, candidate in enumerate(candidates):
            chosen = [index, *at_previous]
            directions = [candidate.proposal, *previous]
            model = QuadraticModel.along(
                directions, gram[chosen][:, chosen], at.gradient, self.rule.total
            )
            coefficients, value = model.minimum()
            if index == 0 or value < lowest:
                best, lowest, weights = candidate, value, coefficients.tolist()
        self.rule.choose(best.gamma)
        self.inverse.use(best.refreshed)
        return Update(
            combination(weights, [best.proposal, *previous]),
            {"alpha": weights[0], "mu": sum(weights[1:]), "model": lowest},
            judged=self.rule.due(at.iteration),
            predicted=lowest,
        )

    def _candidates(self, at: Situation) -> list[_Candidate]:
        """Return a proposal Delta = -Fhat^-1 grad for every gamma that is to be tried."""
        refresh = due(at.iteration, self.refresh_every) or self.inverse.refreshed is None
        if refresh:
            self.rule.scaled(self.inverse.mean_eigenvalue())
        gammas = self.rule.candidates(at.iteration)
        # One gamma may use inverses as they are between refreshes. Several need their own, all of
        # the same averages, else older inverses would be compared with newer ones.
        refresh = refresh or at.again or len(gammas) > 1
        found = []
        for gamma in gammas:
            if refresh:
                self.inverse.refresh(gamma**2)
            applied = self.inverse.precondition(at.gradient)
            proposal = {name: -value for name, value in applied.items()}
            found.append(_Candidate(gamma, proposal, self.inverse.refreshed))
        return found

    def _gram(self, at: Situation, directions: list[Direction]) -> Tensor:
        """Return the products of directions with the exact Fisher, [n, n], of all processes."""

        def products(part: Batch) -> Tensor:
            return self.objective.fisher_gram(part, at.parameters, directions)

        with products_or_reason():
            gram = self.objective.of_first(at.batch, self.fraction, self.fewest, products)
        self.workers.sum_([gram])
        return gram


@dataclass
class ScheduledUpdate:
    """KFC's stochastic form: momentum * previous - lr * proposal, within bounds.

    Attributes:
        inverse: gives proposals.
        rule: has lambda.
        follows: whether lambda follows the mean eigenvalue, and is taken anew at each refresh.
        refresh_every: T3; None for the library's own periods.
        trust_region: largest squared length lr^2 grad^T Fhat^-1 grad of the new part, as KFC has
            it; None for no limit.
        length: in place of that, the rule of ``Preconditioner``; None for KFC's own.
        layers: bounds proposals and steps where there is that rule.
        rate: the learning rate, in units of those of the groups.
    """

    inverse: InverseFisher
    rule: DampingRule
    follows: bool
    refresh_every: int | None
    trust_region: float | None
    length: AdaptiveLength | None
    layers: LayerBounds
    rate: float = 1.0

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
                divisor = 1.0 if self.length is None else self.length.damping_divisor
                self.rule.follow(self.inverse.follow(divisor))
            self.inverse.refresh(self.rule.total, if_moved=True)
        proposal = self.inverse.precondition(at.gradient)
        scale = self._scale(at, proposal)
        # The previous update is written over: with momentum, no more memory than the update itself.
        step = {}
        for name, value in proposal.items():
            rate = -self.rate * at.rates[name] * scale
            previous = at.previous.get(name)
            step[name] = (
                value * rate
                if previous is None
                else previous.mul_(at.momenta[name]).add_(value, alpha=rate)
            )
        if self.length is not None:
            self.length.cut(self.layers.shorten(step, LARGEST_STEP))
        return Update(step, {"trust": scale, "rate": self.rate})

    def _scale(self, at: Situation, proposal: Direction) -> float:
        """Return the factor of a proposal; of one that is not finite it is 1 and all is refused."""
        if self.length is not None:
            scale = self.inverse.scale() if self.follows else NOTHING_LAGS
            names = tuple(proposal)
            layers = self.layers[names]
            gradient = layers.pack([at.gradient[name] for name in names])
            share = self.length.share(gradient, layers.pack(list(proposal.values())), names, scale)
            if not math.isfinite(share):
                return 1.0
            # The proposal as it will be taken is what is compared with the weights.
            self.layers.shorten(proposal, self.length.widest / share)
            return share
        if self.trust_region is None:
            return 1.0
        # The length is of the step that the learning rates of all groups make, not of the
        # proposal: a small rate needs no shortening.
        rates = {name: self.rate * at.rates[name] for name in proposal}
        scaled = {name: at.gradient[name] * rates[name] ** 2 for name in proposal}
        length = float(inner_products([scaled, proposal])[0, 1])
        return min(1.0, math.sqrt(self.trust_region / max(length, 1e-300)))


@dataclass(frozen=True)
class Form:
    """How iterations go from a batch to a step.

    Attributes:
        rule: has lambda and gamma.
        make: makes the update.
        length: says how long proposals are; None where the model does, or the user's trust region.
        statistics_every: period of the statistics; None for ours.
        closures_every: the same of batches inside of closures; None where it is no other.
        statistics_fraction: share of a batch that statistics are of.
        ema_decay: largest weight of the old statistics.
        follows: whether the scale of the newest statistics is followed, as lengths may ask for it.
        scheduled: whether it is the stochastic form.
    """

    rule: DampingRule
    make: UpdateRule
    length: AdaptiveLength | None
    statistics_every: int | None
    closures_every: int | None
    statistics_fraction: float
    ema_decay: float
    follows: bool
    scheduled: bool

    @property
    def compares_batches(self) -> bool:
        """Say whether a batch is left out whose loss or gradient is finite, but an outlier.

        Not where steps are bounded in length, by the rules of ``Preconditioner``.
        """
        # No batch does much harm there, and those left out would be the hard ones: once most losses
        # are small they are outliers whenever they come, and would never be fitted. A finite loss
        # is no reason to undo the last step either. A step of other batches makes a small loss
        # many times as large all the time, and undoing it would lose the momentum as often.
        return self.length is None

    def records(self, iteration: int, batch: Batch) -> bool:
        """Say whether the statistics of a batch are wanted; iterations count from 1."""
        if self.closures_every is not None and callable(batch.inputs):
            return due(iteration, self.closures_every)
        return is_due(iteration - 1, self.statistics_every, STATISTICS)

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
        structure: the one in use.
    """

    inverse: InverseFisher
    objective: Objective
    workers: Workers
    options: KFACOptions
    damping: float | None
    weight_decay: float
    statistics_every: int | None
    refresh_every: int | None
    structure: Structure

    def without_rate_given(self, scheduled: bool) -> Form:
        """Return the form of steps with a rate, or of the model, of a run without ``lr``."""
        return self.scheduled(RATE) if scheduled else self.adaptive()

    def adaptive(self) -> Form:
        """Return the form whose steps minimise the quadratic model.

        Raises:
            UnknownOptionError: inverses come into use later than they are made.
        """
        options = self.options
        if self.workers.staleness:
            raise UnknownOptionError("stale inverses need an lr: without, gamma is searched")
        rows = None
        if options.damping_every is None:
            held_out = HeldOutRule(self.damping, self.weight_decay, options)
            # Who asks for couplings, or none but them, wants steps that have them.
            few = options.exact_rows if self.structure == "block_diagonal" else 0
            rows = FewRows(self.objective, held_out, few)
            rule: DampingRule = held_out
        else:
            rule = DampingRule(self.damping, self.weight_decay, options)
        every = options.gamma_every or 5 if self.refresh_every is None else self.refresh_every
        make = AdaptiveUpdate(
            self.objective,
            self.inverse,
            rule,
            options.products_fraction,
            options.fewest_products,
            every,
            self.workers,
            rows,
        )
        return Form(
            rule,
            make,
            length=None,
            statistics_every=self.statistics_every or 1,
            # Nothing is cut off a closure's batch: whole ones, where inverses are made anew, cost
            # as little as a share tau1 of each.
            closures_every=every if self.statistics_every is None else None,
            statistics_fraction=options.statistics_fraction or 1 / 4,
            ema_decay=0.95 if options.ema_decay is None else options.ema_decay,
            # The form with a rate that may follow has to know what it was like before.
            follows=rows is not None,
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
        quadratic = is_quadratic(self.objective.likelihood)
        length = AdaptiveLength(quadratic) if isinstance(region, str) else None
        layers = [block.parameters for block in self.inverse.curvature.blocks.values()]
        make = ScheduledUpdate(
            self.inverse,
            rule,
            self.damping is None,
            self.refresh_every,
            trust_region=None if isinstance(region, str) else region,
            length=length,
            layers=LayerBounds(self.inverse.covered.parameters, layers, ALONE),
            rate=rate,
        )
        return Form(
            rule,
            make,
            length=length,
            statistics_every=self.statistics_every,
            closures_every=None,
            statistics_fraction=options.statistics_fraction or 1.0,
            ema_decay=DECAY if options.ema_decay is None else options.ema_decay,
            follows=length is not None and self.damping is None,
            scheduled=True,
        )
