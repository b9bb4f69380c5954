"""What is kept of an optimizer's last step: for its momentum, and to undo it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kfac_fx.optim.quadratic import cloned

Direction = dict[str, Tensor]


class LastStep:
    """The last update, and what was before it.

    Attributes:
        update: by parameter name; empty at first, and after a step that was no good.
        parameters, buffers: before the step; empty where there is none to undo.
    """

    def __init__(self) -> None:
        self.update: Direction = {}
        self.parameters: Direction = {}
        self.buffers: Direction = {}

    def take(self, parameters: Mapping[str, Tensor], buffers: Direction, update: Direction) -> None:
        """Makes the step, from buffers that were kept."""
        if self.parameters.keys() == parameters.keys():
            kept = [self.parameters[name] for name in parameters]
            torch._foreach_copy_(kept, list(parameters.values()))
        else:
            self.parameters = cloned(parameters)
        self.buffers = buffers
        torch._foreach_add_(list(parameters.values()), [update[name] for name in parameters])
        self.update = update

    def undo(self, parameters: Mapping[str, Tensor]) -> Direction:
        """Puts the parameters back; returns the buffers that were before."""
        for name, parameter in parameters.items():
            parameter.copy_(self.parameters[name])
        buffers, self.parameters, self.buffers, self.update = self.buffers, {}, {}, {}
        return buffers

    def state(self) -> dict[str, Any]:
        """Tensors by name."""
        before = [cloned(self.parameters), cloned(self.buffers)]
        return {"previous": cloned(self.update), "before": before}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores ``state``."""
        self.update = cloned(state["previous"])
        self.parameters, self.buffers = (cloned(part) for part in state["before"])
