"""Keep an optimizer's last step: for its momentum, and to undo it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kfac_fx.optim.products import Direction, Parameters
from kfac_fx.optim.quadratic import cloned
from kfac_fx.torch_internals import foreach

Buffers = dict[str, Tensor]
"""The network's buffers by name: running statistics of normalisation layers."""

SAME = 1e-7
"""Objectives that differ by this part, a rounding of float32, are of the same cases."""


class LastStep:
    """The last update, and what was before it.

    Copies are kept rather than the update subtracted: in floating point, a difference does not
    give back what was there.

    Attributes:
        update: the update by parameter name; empty at first, and after a step that was no good.
        parameters: before the step; empty where there is none to undo.
        buffers: before the step; empty where there is none to undo.
        objectives: before and after the step, on its own batch; None where nobody has compared.
    """

    def __init__(self) -> None:
        self.update: Direction = {}
        self.parameters: Direction = {}
        self.buffers: Buffers = {}
        self.objectives: tuple[float, float] | None = None

    def take(self, parameters: Parameters, buffers: Buffers, update: Direction) -> None:
        """Make the step.

        Args:
            parameters: the optimizer's own; the update is added to them.
            buffers: copies from before the forward of this step.
            update: the update by the names of ``parameters``; it is kept, not copied.
        """
        if self.parameters.keys() == parameters.keys():  # the memory is there from earlier steps
            kept = [self.parameters[name] for name in parameters]
            foreach.copy_(kept, list(parameters.values()))
        else:
            self.parameters = cloned(parameters)
        self.buffers = buffers
        self.objectives = None
        # In place: the network and its compiled pass go on with the same tensors.
        foreach.add_(list(parameters.values()), [update[name] for name in parameters])
        self.update = update

    def put_back(self, parameters: Parameters) -> None:
        """Put the parameters back, and forget the step but not that there was none before it."""
        foreach.copy_(list(parameters.values()), [self.parameters[name] for name in parameters])
        self.forget_update()

    def undo(self, parameters: Parameters) -> Buffers:
        """Put the parameters back; return the buffers from before, and forget the step."""
        self.put_back(parameters)
        # The update is forgotten too: as momentum it would lead back to where the step was undone.
        buffers = self.buffers
        self.forget_update()
        self.parameters = {}
        self.buffers = {}
        return buffers

    def began_at(self, objective: float) -> float | None:
        """Return the objective before the step, if that after it is known to be ``objective``.

        Batches that agree in all digits are the same cases: no pass has to tell what is known.
        """
        before, after = self.objectives or (math.nan, math.nan)
        # "<" rather than "<=": any two batches may have a loss of zero.
        return before if abs(objective - after) < SAME * abs(after) else None

    def forget_update(self) -> None:
        """Let the next step start without momentum."""
        self.update = {}

    def update_copy(self) -> Direction:
        """Return a copy of the update."""
        return cloned(self.update)

    def before(self) -> list[Any]:
        """Return copies of the parameters and the buffers from before the step, and objectives."""
        return [cloned(self.parameters), cloned(self.buffers), self.objectives]

    def load(self, update: Parameters, before: Sequence[Any]) -> None:
        """Restore an update, and what ``before`` returned; earlier states have no objectives."""
        parameters, buffers, *objectives = before
        self.update = cloned(update)
        self.parameters = cloned(parameters)
        self.buffers = cloned(buffers)
        self.objectives = objectives[0] if objectives else None
