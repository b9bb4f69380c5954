"""The model of the objective of one batch, in the space of its rows.

With J the derivatives of the rows, e their residuals and T the number of terms, the model of a loss
that is quadratic in the outputs is ||e + J delta||^2 / (2 T). Its damped minimum takes a system of
as many equations as there are rows, whatever the number of parameters. See
docs/explanation/mathematics.md, section 9.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kfac_fx.optim.case_rows import CaseRows
    from kfac_fx.optim.products import Direction, Parameters

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
        gradient: of the loss, by parameter name.
        parameters: theta.
        decays: eta of each parameter.
    """

    def __init__(
        self,
        rows: CaseRows,
        gradient: Parameters,
        parameters: Parameters,
        decays: Mapping[str, float],
    ) -> None:
        self._rows = rows
        # The gradient of the rows that J does not have. Of none it would be that of roundings,
        # which directions without curvature make large.
        self._others: Direction = {}
        if not rows.whole:
            found = rows.gradient()
            self._others = {n: g.double() - found[n].view(g.shape) for n, g in gradient.items()}
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
        + lambda / 2 ||delta - mu delta_0||^2, whose first two terms are the model. Of rows that J
        does not have, the gradient times delta is in it.

        Args:
            damping: lambda.
            previous: delta_0 by parameter name; empty for zero.
        """
        rows, decays = self._rows, self._decays
        total = {name: damping + eta for name, eta in decays.items()}
        # The minimum where the rows say nothing.
        step = {n: p.double() * (-decays[n] / total[n]) for n, p in self._parameters.items()}
        for name, value in previous.items():
            step[name].add_(value, alpha=MOMENTUM * damping / total[name])
        for name, value in self._others.items():
            step[name].sub_(value, alpha=1 / total[name])
        system = torch.stack([g / (damping + eta) for eta, g in self._grams.items()]).sum(0)
        # With T it has a factor, but for the rounding of what is large beside T: a small lambda.
        system.diagonal().add_(rows.terms + torch.finfo(system.dtype).eps * float(system.trace()))
        error = (rows.residuals + rows.along(step)).unsqueeze(1)
        weights = torch.cholesky_solve(error, torch.linalg.cholesky(system)).squeeze(1)
        for name, J in rows.jacobian.items():
            step[name].view(-1).addmv_(J.T, weights, alpha=-1 / total[name])
        return step, self._change(step)

    def _change(self, step: Direction) -> float:
        """Return the model's change of the objective by a step."""
        rows = self._rows
        moved = rows.along(step)
        change = float(moved @ (rows.residuals + 0.5 * moved)) / rows.terms
        change += sum(float((value * step[n]).sum()) for n, value in self._others.items())
        for name, eta in self._decays.items():
            if eta:
                value = step[name]
                change += eta * float((value * (self._parameters[name] + 0.5 * value)).sum())
        return change
