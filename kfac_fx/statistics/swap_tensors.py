"""Other tensors in the place of a module's own, for the time of a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn


class _Place(NamedTuple):
    """An entry of a module's parameters or buffers, what it holds, and the name that this has."""

    holder: dict[str, Tensor | None]
    key: str
    tensor: Tensor
    name: str


def _holders(module: nn.Module) -> tuple[Any, Any]:
    return module._parameters, module._buffers


class Places:
    """Where a module and its parts hold their tensors.

    What ``torch.func.functional_call`` walks through the module for at every call, found once, and
    again when something else is held.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._places = self._find()

    def _find(self) -> list[_Place]:
        tensors = *self._net.named_parameters(), *self._net.named_buffers()
        names = {id(tensor): name for name, tensor in tensors}
        return [
            _Place(holder, key, tensor, names[id(tensor)])
            for module in self._net.modules()
            for holder in _holders(module)
            for key, tensor in holder.items()
            if tensor is not None
        ]

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name; what is held twice comes once."""
        if any(holder.get(key) is not tensor for holder, key, tensor, _ in self._places):
            self._places = self._find()
        return {name: tensor for _, _, tensor, name in self._places}

    @contextmanager
    def swapped(self, state: dict[str, Tensor]) -> Iterator[None]:
        """The module holds the tensors of ``state`` inside, and its own again after.

        Buffers that it assigns inside go into ``state``; what ``state`` lacks stays as it is.

        Args:
            state: by the names of ``tensors``.
        """
        places = [place for place in self._places if place.name in state]
        for holder, key, _, name in places:
            holder[key] = state[name]
        try:
            yield
        finally:
            for holder, key, tensor, name in places:
                held = holder[key]
                if held is not None:
                    state[name] = held
                holder[key] = tensor
