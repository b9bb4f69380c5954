"""Steps with the exact Fisher of a batch whose rows are few, in the space of the rows.

With J the derivatives of the rows, e their residuals and T the number of terms, the model of a loss
that is quadratic in the outputs is ||e + J delta||^2 / (2 T). Its damped minimum takes a system of
as many equations as there are rows, whatever the number of parameters. See
docs/explanation/mathematics.md, section 9.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kfac_fx.optim.case_rows import CaseRows, NoRowsError
from kfac_fx.optim.held_out import HeldOutRule
from kfac_fx.optim.situation import Situation, Update

if TYPE_CHECKING:
    from kfac_fx.optim.objective import Objective
    from kfac_fx.optim.products import Direction, Parameters

log = logging.getLogger("kfac_fx")

MOMENTUM = 0.8
"""mu, the share of the previous update that a step begins with: what other batches have found stays
where this one says nothing. Without it the fit of one batch is lost in the next; at 0.95 steps go
on after they have gone far enough."""

AT_ONCE = 128
"""Rows of J J^T that are made at once. It is symmetric, and only its lower half is wanted."""


class RowsModel:
    """The model of the objective of one batch, and its damped minimum for any lambda.

    Args:
        rows: J, e and T.
        parameters: theta, by name.
        decays: eta of each parameter.
    """

    def __init__(self, rows: CaseRows, parameters: Parameters, decays: Mapping[str, float]) -> None:
        self._rows = rows
        self._parameters = parameters
        self._decays = decays
        count = len(rows.residuals)
        # J D J^T with D = 1 / (lambda + eta) comes for any lambda from one matrix for each eta.
        self._grams: dict[float, Tensor] = {}
        for name, J in rows.jacobian.items():
            gram = self._grams.setdefault(decays[name], J.new_zeros(count, count))
            for start in range(0, count, AT_ONCE):
                stop = start + AT_ONCE
                gram[start:, start:stop].addmm_(J[start:], J[start:stop].T)

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return len(self._rows.residuals)

    @property
    def mean_eigenvalue(self) -> float:
        """Return the mean eigenvalue of F = J^T J / T."""
        trace = sum(float(gram.diagonal().sum()) for gram in self._grams.values())
        return trace / self._rows.terms / sum(p.numel() for p in self._parameters.values())

    def minimum(self, damping: float, previous: Parameters) -> tuple[Direction, float]:
        """Return delta, and the model's change of the objective.

        delta minimises ||e + J delta||^2 / (2 T) + eta / 2 ||theta + delta||^2
        + lambda / 2 ||delta - mu delta_0||^2, whose first two terms are the model.

        Args:
            damping: lambda.
            previous: delta_0 by parameter name; empty for zero.
        """
        rows, decays = self._rows, self._decays
        total = {name: damping + eta for name, eta in decays.items()}
        # The minimum of the last two terms, where the rows say nothing.
        step = {n: p.double() * (-decays[n] / total[n]) for n, p in self._parameters.items()}
        for name, value in previous.items():
            step[name].add_(value, alpha=MOMENTUM * damping / total[name])
        system = torch.stack([g / (damping + eta) for eta, g in self._grams.items()]).sum(0)
        system.diagonal().add_(rows.terms)
        error = (rows.residuals + rows.along(step)).unsqueeze(1)
        # It is at least T, however small lambda is: there is always a factor.
        weights = torch.cholesky_solve(error, torch.linalg.cholesky(system)).squeeze(1)
        for name, J in rows.jacobian.items():
            step[name].view(-1).addmv_(J.T, weights, alpha=-1 / total[name])
        return step, self._change(step)

    def _change(self, step: Direction) -> float:
        """Return the model's change of the objective by a step."""
        rows = self._rows
        moved = rows.along(step)
        change = float(moved @ (rows.residuals + 0.5 * moved)) / rows.terms
        for name, eta in self._decays.items():
            if eta:
                value = step[name]
                change += eta * float((value * (self._parameters[name] + 0.5 * value)).sum())
        return change


class FewRows:
    """Makes steps of whole batches whose rows are few, as long as all batches are of that kind.

    Args:
        objective: runs the network.
        rule: has lambda, and whether all batches have been of that kind.
        most: so many rows are few.
    """

    def __init__(self, objective: Objective, rule: HeldOutRule, most: int) -> None:
        self._objective = objective
        self._rule = rule
        self._most = most
        self._model: RowsModel | None = None
        rule.exact = most > 0 and objective.has_rows

    @property
    def serve(self) -> bool:
        """Say whether steps are made here."""
        return self._rule.exact

    def make(self, at: Situation) -> Update | None:
        """Return the update; None where the batch is of another kind, and from there on."""
        if not at.again or self._model is None:
            self._model = None  # two of them would take twice the memory
            try:
                self._model = self._model_at(at)
            except NoRowsError as error:
                log.debug("iteration %d: steps are of blocks: %s", at.iteration, error)
                self._rule.exact = False
                return None
            self._rule.scaled(self._model.mean_eigenvalue)
        # What led to a step that was no good is not gone on with.
        previous = {} if at.again else at.previous
        step, change = self._model.minimum(self._rule.damping, previous)
        made = {name: value.to(at.parameters[name].dtype) for name, value in step.items()}
        numbers = {"model": change, "rows": float(self._model.rows)}
        return Update(made, numbers, judged=True, predicted=change)

    def _model_at(self, at: Situation) -> RowsModel:
        rows = self._objective.rows(at.batch, at.parameters, self._most)
        # Of the loss alone, without its l2 term.
        decays, parameters = at.decays, at.parameters
        rows.check({n: g.sub(parameters[n], alpha=decays[n]) for n, g in at.gradient.items()})
        return RowsModel(rows, parameters, decays)
