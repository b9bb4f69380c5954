"""From the gradient to the update: with the quadratic model (K-FAC), or a learning rate (KFC)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from kfac_fx.curvature.inverses import InverseFisher
from kfac_fx.likelihoods.batch import BatchLikelihood
from kfac_fx.optim.adapt_damping import DampingRule
from kfac_fx.optim.objective import Task
from kfac_fx.optim.quadratic import QuadraticModel, combination, fisher_gram, inner_products
from kfac_fx.parallel import Workers

Direction = dict[str, Tensor]

LEAST_PRODUCTS = 512
"""Cases for products with the exact Fisher: directions that few cases do not see look flat."""


class Situation(NamedTuple):
    """What an update is made from.

    Attributes:
        batch: (inputs, targets).
        gradient: of the objective with its l2 term.
        previous: the last update, empty at first; the new one may be written into it.
        options: of each parameter's group, by option and name.
    """

    iteration: int
    batch: tuple[Any, Any]
    parameters: Mapping[str, Tensor]
    gradient: Direction
    previous: Direction
    options: Mapping[str, Mapping[str, float]]


class Update(NamedTuple):
    """An update, the change of the objective that the model predicts, and numbers to show."""

    step: Direction
    predicted: float
    numbers: dict[str, float]


class Rule(Protocol):
    """Makes updates."""

    @property
    def damping(self) -> float:
        """gamma^2 of factored Tikhonov damping."""

    def __call__(self, at: Situation) -> Update:
        """The update of one iteration."""


def due(iteration: int, every: int) -> bool:
    """In the first three iterations, and every so many (T3)."""
    return iteration <= 3 or iteration % every == 0


@dataclass
class AdaptiveUpdate:
    """Algorithm 2: the gamma of the lowest model, and the model's own alpha and mu.

    Attributes:
        fraction: tau2, of the batch for products with the exact Fisher.
        refresh_every: T3.
    """

    task: Task
    inverse: InverseFisher
    rule: DampingRule
    fraction: float
    refresh_every: int
    workers: Workers

    @property
    def damping(self) -> float:
        return self.rule.gamma * self.rule.gamma

    def __call__(self, at: Situation) -> Update:
        made = [
            (gamma, self._proposal(at, gamma), self.inverse.inverses)
            for gamma in self._refreshed(at)
        ]
        previous = [at.previous] if at.previous else []
        directions = [proposal for _, proposal, _ in made] + previous
        gram = self._gram(at, directions)
        answers = []
        for index, (gamma, proposal, inverses) in enumerate(made):
            chosen = [index, *range(len(made), len(directions))]
            pair = [proposal, *previous]
            B = gram[chosen][:, chosen]
            model = QuadraticModel.along(pair, B, at.gradient, self.rule.total)
            coefficients, value = model.minimum()
            answers.append((value, coefficients.tolist(), pair, gamma, inverses))
        best = min(answers, key=lambda answer: answer[0])
        value, (alpha, *mu), pair, self.rule.gamma, self.inverse.inverses = best
        numbers = {"alpha": alpha, "mu": sum(mu), "model": value}
        return Update(combination([alpha, *mu], pair), value, numbers)

    def _refreshed(self, at: Situation) -> list[float]:
        """The candidates for gamma; several, or a refresh that is due, need new inverses."""
        gammas = self.rule.candidates(at.iteration)
        fresh = len(gammas) == 1 and not due(at.iteration, self.refresh_every)
        self._reuse = fresh and bool(self.inverse.inverses)
        return gammas

    def _proposal(self, at: Situation, gamma: float) -> Direction:
        """Delta = -Fhat^-1 grad."""
        if not self._reuse:
            self.inverse.refresh(gamma**2)
        return {name: -value for name, value in self.inverse.apply(at.gradient).items()}

    def _gram(self, at: Situation, directions: list[Direction]) -> Tensor:
        inputs, targets = self.task.first(at.batch, self.fraction, LEAST_PRODUCTS)

        def run(parameters: Mapping[str, Tensor]) -> BatchLikelihood:
            with self.task.aside():
                outputs = self.task.outputs(inputs, parameters)
            return self.task.predictive(outputs, targets)

        gram = fisher_gram(run, at.parameters, directions)
        self.workers.sum_([gram])
        return gram


@dataclass
class ScheduledUpdate:
    """KFC's stochastic form: momentum * previous - lr * proposal, within a trust region.

    Attributes:
        trust_region: largest squared length lr^2 grad^T Fhat^-1 grad of the new part.
    """

    inverse: InverseFisher
    rule: DampingRule
    refresh_every: int
    trust_region: float | None

    @property
    def damping(self) -> float:
        return self.rule.total

    def __call__(self, at: Situation) -> Update:
        if due(at.iteration, self.refresh_every) or not self.inverse.inverses:
            self.inverse.keep_up(self.rule.total)
        rates, momenta = at.options["lr"], at.options["momentum"]
        proposal = self.inverse.apply(at.gradient)
        scale = 1.0
        if self.trust_region is not None:
            scaled = {name: at.gradient[name] * rates[name] ** 2 for name in proposal}
            length = float(inner_products([scaled, proposal])[0, 1])
            scale = min(1.0, (self.trust_region / max(length, 1e-300)) ** 0.5)
        step = {}
        for name, value in proposal.items():
            rate, previous = -rates[name] * scale, at.previous.get(name)
            step[name] = (
                value * rate
                if previous is None
                else previous.mul_(momenta[name]).add_(value, alpha=rate)
            )
        return Update(step, 0.0, {"trust": scale})
