"""What a net must be, and notices parameters that are no longer those of the transform."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from kfac_fx.config import STRUCTURES, Structure, choice
from kfac_fx.errors import KFACError, ParameterChangedError, UnknownOptionError
from kfac_fx.ir import CurvatureGraph
from kfac_fx.ops.net_buffers import STORE
from kfac_fx.passes.annotations import read_curvature


class CoveredParameters:
    """The covered parameters, each with the module that owns it.

    Attributes:
        parameters: canonical name -> parameter, in the order given.
    """

    def __init__(self, net: nn.Module, names: Iterable[str]) -> None:
        self._modules = dict(net.named_modules(remove_duplicate=False))
        self.parameters: dict[str, nn.Parameter] = {}
        self._expected = {}
        for name in names:
            owner, _, leaf = name.rpartition(".")
            parameter = self._modules[owner].get_parameter(leaf)
            self.parameters[name] = parameter
            self._expected[name] = (owner, leaf, parameter.shape, parameter.dtype, parameter.device)

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that there are, by name; sparse ones are made dense in their place."""
        for parameter in self.parameters.values():
            if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                parameter.grad = parameter.grad.to_dense()
        return {n: p.grad for n, p in self.parameters.items() if p.grad is not None}

    def in_module_order(self) -> dict[str, nn.Parameter]:
        """``parameters`` in the order of the module's own ``parameters()``."""
        self.check()
        place = {id(p): index for index, p in enumerate(self._modules[""].parameters())}
        return dict(sorted(self.parameters.items(), key=lambda item: place[id(item[1])]))

    def check(self) -> None:
        """Cheap enough for every step.

        Raises:
            ParameterChangedError: a parameter was replaced, reshaped, cast or moved.
        """
        for name, (owner, leaf, shape, dtype, device) in self._expected.items():
            parameter = self.parameters[name]
            now = self._modules[owner]._parameters.get(leaf)
            change = None
            if now is not parameter:
                change = "was replaced by another object"
            elif parameter.shape != shape:
                change = f"changed its shape from {tuple(shape)} to {tuple(parameter.shape)}"
            elif parameter.dtype != dtype:
                change = f"changed its dtype from {dtype} to {parameter.dtype}"
            elif parameter.device != device:
                change = f"is on {parameter.device}, its factors stayed on {device}"
            if change is not None:
                raise ParameterChangedError(
                    f"parameter {name} {change} after the transform: transform the model again and "
                    "make a new Preconditioner"
                )


def _curvature(net: Any) -> CurvatureGraph:
    """From the module's meta, or read back from its taps where other passes lost that."""
    found = getattr(net, "meta", {}).get("kfac_fx")
    if isinstance(found, CurvatureGraph):
        return found
    found = read_curvature(net) if isinstance(net, fx.GraphModule) else None
    if found is None:
        raise KFACError(
            "this is no module that kfac_fx.transform(model) returned, and no tap in it carries "
            "annotations: kfac_fx.passes.KFACTransform() puts taps into a GraphModule, and a model "
            "that is compiled with kfac_fx.backend must have run once"
        )
    parameters = dict(net.named_parameters(remove_duplicate=False))
    lost = [name for name in found.covered if name not in parameters]
    if lost or not hasattr(net, STORE):
        what = f"no parameter {lost[0]}" if lost else "no factor buffers"
        raise KFACError(
            f"the taps are of another module: this one has {what}. Give the Preconditioner the "
            "module that was transformed (it shares parameters and buffers with its parts)"
        )
    for slot in getattr(net, STORE).modules():  # fx has copied them as a part of the state_dict
        slot._non_persistent_buffers_set.update(slot._buffers)
    net.meta["kfac_fx"] = found
    return found


def transformed(net: Any, structure: Structure | None) -> tuple[CurvatureGraph, Structure]:
    """The curvature graph of what ``transform`` returned, and the structure that is wanted.

    Raises:
        KFACError: it is another module.
        UnknownOptionError: the structure is unknown, or the module records no cross factors.
    """
    curvature = _curvature(net)
    wanted = choice("structure", structure or curvature.structure, STRUCTURES)
    if wanted == "block_diagonal":
        return curvature, "block_diagonal"
    if curvature.structure != "block_tridiagonal":
        raise UnknownOptionError(
            "structure='block_tridiagonal', but the module was transformed with "
            f"structure={curvature.structure!r}, so it records no cross factors"
        )
    return curvature, "block_tridiagonal"
