"""Let a captured module answer for its model: items, methods, properties, values, containers."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

Value = Any
"""An index, an entry, a length, or what an attribute is."""

PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)
READ = (*PLAIN, list, tuple, dict, set, collections.deque)
"""Of what the model's object holds, these can be read: containers are the model's own. ``config``
is not, whatever it is: trainers write into one that they find, and a graph that was made with
another one no longer stands."""


REWRITTEN = (
    "eval",
    "parameters",
    "buffers",
    "requires_grad_",
    "zero_grad",
    "apply",
    "_apply",
    "to",
    "cuda",
    "cpu",
    "type",
    "float",
    "double",
    "half",
    "bfloat16",
)
"""Methods of every module that a model may have written anew (``eval`` sets a norm apart, ``to``
moves plain tensors); ``train`` and those of the state are in ``CapturedModule``."""

OURS = "_kfac_fx"
"""What the names of a captured module's own children begin with."""


class HasSource(Protocol):
    """A captured module, which knows its model."""

    @property
    def source(self) -> nn.Module | None:
        """Return the user's model."""


class HandedOn:
    """An attribute that a captured module reads of its model.

    Methods are the model's own: ``net.encode(x)`` runs its code, on the parameters that both have,
    and is not recorded.

    Args:
        name: of the attribute.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, module: HasSource | None, kind: type) -> Value:
        # Of the class there is nothing to tell, and inspection wants an answer.
        return self if module is None else getattr(module.source, self._name)


def hand_on(module: nn.Module, model: nn.Module) -> None:
    """Let ``net[0]``, ``len(net)`` and ``net.encode(x)`` be what they are of the model.

    What the captured module has itself stays, and so do names with an underscore in front.

    Args:
        module: the captured module, which knows its model.
        model: the user's model.
    """
    # fx makes a class of its own for every GraphModule, and Python looks methods up on the class.
    # A ``__getattr__`` would be run for every child that a forward reads.
    kind = type(module)
    members = {*module._parameters, *module._buffers, *module._modules, *vars(module)}
    values = [n for n, value in vars(model).items() if isinstance(value, READ) and n != "config"]
    for name in {*dir(type(model)), *values}:
        if name[0] != "_" and name not in members and not hasattr(kind, name):
            setattr(kind, name, HandedOn(name))
    for name in REWRITTEN:
        if getattr(type(model), name) is not getattr(nn.Module, name):
            setattr(kind, name, _rewritten(name))
    # Only where the model has them: an object with a length of zero counts as false.
    for name in ("__len__", "__getitem__", "__iter__", "__contains__"):
        if hasattr(type(model), name):
            setattr(kind, name, _method(name))


def is_handed_on(kind: type, name: str) -> bool:
    """Tell whether a class of captured modules reads an attribute of the model."""
    return isinstance(vars(kind).get(name), HandedOn)


def _rewritten(name: str) -> Callable[..., Value]:
    """Return a method that the model runs, and the captured module's own children after it."""

    def method(self: Any, *args: Value, **kwargs: Value) -> Value:
        model = self.source
        result = getattr(model, name)(*args, **kwargs)
        if name in ("parameters", "buffers"):
            return result
        for child_name, child in self._modules.items():
            if child_name.startswith(OURS) and child is not None and name != "apply":
                getattr(child, name)(*args, **kwargs)
        self.training = model.training
        return self if result is model else result

    return method


def _method(name: str) -> Callable[..., Value]:
    """Return a method that asks the model."""

    def method(self: HasSource, *args: Value) -> Value:
        return getattr(type(self.source), name)(self.source, *args)

    return method
