"""Check that a net was transformed, and read the parameters that its blocks cover."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from kfac_fx.config import STRUCTURES, Structure, choice
from kfac_fx.errors import KFACError, ParameterChangedError, UnknownOptionError
from kfac_fx.ir.curvature_graph import CurvatureGraph
from kfac_fx.ops.net_buffers import STORE
from kfac_fx.passes.annotations import read_curvature


class _Expected(NamedTuple):
    """The place, shape, precision and device that a parameter had at the transform."""

    held: Mapping[str, Tensor | None]
    leaf: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class CoveredParameters:
    """The covered parameters, each with the module that owns it.

    Averages, taps and the generated program are for the parameters as they were. A parameter that
    is replaced or cast later would be preconditioned with the curvature of another one, so every
    step checks, by identity and a few attributes.

    Args:
        net: the transformed module.
        names: canonical names of the parameters.
        frozen: names of parameters that did not train at the transform, so that no block has them.

    Attributes:
        parameters: canonical name -> parameter, in the order given.
    """

    def __init__(self, net: nn.Module, names: Iterable[str], frozen: Iterable[str] = ()) -> None:
        self._net = net
        self.parameters: dict[str, nn.Parameter] = {}
        self._expected: dict[str, _Expected] = {}
        modules = dict(net.named_modules(remove_duplicate=False))
        for name in names:
            path, _, leaf = name.rpartition(".")
            owner = modules[path]
            # Not by get_parameter, which a scripted module refuses. Such a module keeps parameters
            # out of Python's sight, and replaces none.
            now = getattr(owner, leaf)
            held = owner._parameters if type(owner._parameters) is dict else {leaf: now}
            self.parameters[name] = now
            self._expected[name] = _Expected(held, leaf, now.shape, now.dtype, now.device)
        known = dict(net.named_parameters(remove_duplicate=False))
        # Parts of a model (a compiled graph) need not have all that the whole has.
        self._frozen = [(name, known[name]) for name in frozen if name in known]

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients that there are, by name, once the parameters are checked.

        Sparse gradients become dense in their place, as ``Preconditioner`` writes to what it gets
        here: the inverse of a block has no zeros to keep.

        Raises:
            ParameterChangedError: see ``check``.
        """
        found = {}
        for name, parameter in self.parameters.items():
            held, leaf, shape, dtype, device = self._expected[name]
            same = held.get(leaf) is parameter and parameter.shape == shape
            if not (same and parameter.dtype == dtype and parameter.device == device):
                self.check()
            gradient = parameter.grad
            if gradient is not None and gradient.layout is not torch.strided:
                gradient = parameter.grad = gradient.to_dense()
            if gradient is not None:
                found[name] = gradient
        if any(parameter.requires_grad for _, parameter in self._frozen):
            self.check()
        return found

    def in_module_order(self) -> dict[str, nn.Parameter]:
        """Return ``parameters`` in the order of the module's own ``parameters()``."""
        self.check()
        place = {id(p): index for index, p in enumerate(self._net.parameters())}
        return dict(sorted(self.parameters.items(), key=lambda item: place[id(item[1])]))

    def check(self) -> None:
        """Raise if a parameter is not what it was; cheap enough for every step.

        Raises:
            ParameterChangedError: a parameter was replaced, reshaped, cast or moved, or one that
                was frozen at the transform trains now.
        """
        # No call of named_parameters(): walking a deep module would cost more than the step's glue.
        for name, was in self._expected.items():
            parameter = self.parameters[name]
            change = None
            if was.held.get(was.leaf) is not parameter:
                change = "was replaced by another object"
            elif parameter.shape != was.shape:
                change = f"changed its shape from {tuple(was.shape)} to {tuple(parameter.shape)}"
            elif parameter.dtype != was.dtype:
                change = f"changed its dtype from {was.dtype} to {parameter.dtype}"
            elif parameter.device != was.device:
                change = f"is on {parameter.device}, its factors stayed on {was.device}"
            if change is not None:
                raise ParameterChangedError(
                    f"parameter {name} {change} after the transform: transform the model again and "
                    "make a new Preconditioner"
                )
        # Its plain gradient among preconditioned ones would be a step of another size, and KFAC
        # would not move it at all.
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise ParameterChangedError(
                    f"parameter {name} was frozen at the transform and trains now, but no block "
                    "has it: transform the model again and make a new Preconditioner or KFAC, or "
                    "leave it out for good with transform(..., exclude=...)"
                )


def _curvature(net: object) -> CurvatureGraph:
    """Return the curvature graph of the module's meta, or of its taps where other passes lost that.

    fx copies a graph's nodes with their meta, but a GraphModule's own meta is dropped by many
    passes, and by pickling.
    """
    # Users pass modules through fx's own transforms and torch.export before they get here.
    found = getattr(net, "meta", {}).get("kfac_fx")
    if isinstance(found, CurvatureGraph):
        return found
    found = read_curvature(net) if isinstance(net, fx.GraphModule) else None
    if found is None or not isinstance(net, fx.GraphModule):
        raise KFACError(
            "this is no module that kfac_fx.transform(model) returned: call net = "
            "kfac_fx.transform(model), and give net. (No tap in it carries annotations either: "
            "kfac_fx.passes.KFACTransform() puts taps into a GraphModule, and a model that is "
            "compiled with kfac_fx.backend must have run once.)"
        )
    parameters = dict(net.named_parameters(remove_duplicate=False))
    # A graph that was cut out of a larger one has taps, but not what they record into.
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


def transformed(
    net: object, structure: Structure | None, *, coupled: bool = False
) -> tuple[CurvatureGraph, Structure]:
    """Return the curvature graph of a transformed module, and the structure that is wanted.

    Args:
        net: what ``kfac_fx.transform`` returned, or any GraphModule with its annotated taps.
        structure: None for what the transform was asked for.
        coupled: whether the couplings are taken where neither asks for a structure.

    Raises:
        KFACError: it is another module.
        UnknownOptionError: the structure is unknown, or the module records no cross factors.
    """
    curvature = _curvature(net)
    own = curvature.structure if coupled else curvature.preferred
    wanted = choice("structure", structure or own, STRUCTURES)
    if wanted == "block_diagonal":
        return curvature, "block_diagonal"
    if curvature.structure != "block_tridiagonal":
        raise UnknownOptionError(
            "structure='block_tridiagonal', but the module was transformed with "
            f"structure={curvature.structure!r}, so it records no cross factors"
        )
    return curvature, "block_tridiagonal"


def layer_numbers(layers: Iterable[Sequence[str]]) -> dict[str, int]:
    """Return the number of each parameter's layer, by name.

    Args:
        layers: names of parameters that are measured together, such as a weight and its bias;
            slices of one parameter are blocks of one layer.
    """
    found: dict[str, int] = {}
    for number, names in enumerate(layers):
        for name in names:
            found.setdefault(name, number)
    return found
