"""Let a captured module be indexed, iterated over and measured as its model is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

Value = Any
"""An index, an entry or a length."""


class HasSource(Protocol):
    """A captured module, which knows its model."""

    @property
    def source(self) -> nn.Module | None:
        """Return the user's model."""


def hand_on_items(module: HasSource, model: nn.Module) -> None:
    """Let ``net[0]`` and ``len(net)`` be what they are of the model, where it has them.

    Args:
        module: the captured module.
        model: the user's model.
    """
    # fx makes a class of its own for every GraphModule, and Python looks these up on the class.
    # Only where the model has them: an object with a length of zero counts as false.
    for name in ("__len__", "__getitem__", "__iter__", "__contains__"):
        if hasattr(type(model), name):
            setattr(type(module), name, _handed_on(name))


def _handed_on(name: str) -> Callable[..., Value]:
    """Return a method that asks the model."""

    def method(self: HasSource, *args: Value) -> Value:
        return getattr(type(self.source), name)(self.source, *args)

    return method
