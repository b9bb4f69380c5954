"""An optimizer's parameters and the options of their groups, by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from kfac_fx.errors import UnknownOptionError
from kfac_fx.parallel import WholeParameters


class Groups:
    """The parameter groups of an optimizer.

    Args:
        names: of the parameters that groups may have.
        held: the parameters as a whole.

    Raises:
        UnknownOptionError: a group has another parameter.
    """

    def __init__(
        self, optimizer: Optimizer, names: Mapping[str, Tensor], held: WholeParameters
    ) -> None:
        self._optimizer, self._held = optimizer, held
        self._names = {id(p): name for name, p in names.items()}
        if any(id(p) not in self._names for g in optimizer.param_groups for p in g["params"]):
            raise UnknownOptionError("params holds a parameter without a curvature block")

    def parameters(self) -> dict[str, Tensor]:
        """Name -> parameter."""
        return {name: self._held[name] for name in self.options("params")}

    def options(self, key: str) -> dict[str, float]:
        """Name -> what the parameter's group has."""
        groups = self._optimizer.param_groups
        return {self._names[id(p)]: group[key] for group in groups for p in group["params"]}

    def l2(self) -> float:
        """The sum of eta / 2 ||theta||^2 over the groups."""
        decay = self.options("weight_decay")
        terms = [0.5 * decay[n] * p.double().square().sum() for n, p in self.parameters().items()]
        return float(torch.stack(terms).sum())
