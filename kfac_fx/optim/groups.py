"""An optimizer's parameters and the options of their groups, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from kfac_fx.errors import UnknownOptionError
from kfac_fx.optim.products import Direction
from kfac_fx.parallel import WholeParameters
from kfac_fx.torch_internals import foreach

GroupOption = Literal["lr", "momentum", "weight_decay"]


class Groups:
    """The parameter groups of an optimizer, read anew each time: schedulers change them.

    Args:
        optimizer: has ``param_groups``.
        names: the names of the parameters that groups may have, with the parameters.
        whole: the same parameters with all their entries.

    Raises:
        UnknownOptionError: a group has another parameter.
    """

    def __init__(
        self, optimizer: Optimizer, names: Mapping[str, Tensor], whole: WholeParameters
    ) -> None:
        self._optimizer = optimizer
        self._whole = whole
        # A parameter outside of all blocks has no Fhat, and would take steps of gradient descent
        # with K-FAC's sizes: it belongs to another optimizer.
        self._names = {id(p): name for name, p in names.items()}
        if any(id(p) not in self._names for g in optimizer.param_groups for p in g["params"]):
            raise UnknownOptionError("params holds a parameter without a curvature block")

    def parameters(self) -> Direction:
        """Return the parameters of all groups by name, as tensors that may be changed."""
        groups = self._optimizer.param_groups
        names = [self._names[id(p)] for group in groups for p in group["params"]]
        return {name: self._whole[name] for name in names}

    def options(self, key: GroupOption) -> dict[str, float]:
        """Return what each parameter's group has for an option, by parameter name."""
        groups = self._optimizer.param_groups
        return {self._names[id(p)]: group[key] for group in groups for p in group["params"]}

    def l2(self, parameters: Mapping[str, Tensor] | None = None) -> float:
        """Return the l2 term: the sum of eta / 2 ||theta||^2 over the groups.

        Args:
            parameters: theta by name; None for the present ones.
        """
        decay = self.options("weight_decay")
        at = self.parameters() if parameters is None else parameters
        decayed = {name: p for name, p in at.items() if decay[name]}
        if not decayed:
            return 0.0
        # In float64: the reduction ratio is a small difference of two objectives.
        norms = torch.stack(foreach.norm(list(decayed.values()), 2, torch.float64)).tolist()
        pairs = zip(decayed, norms, strict=True)
        return math.fsum(0.5 * decay[name] * norm**2 for name, norm in pairs)
