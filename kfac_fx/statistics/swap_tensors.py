"""Other tensors in the place of a module's own, for the time of a call.

``torch.func.functional_call`` does the same, and walks through the module for it at every call.
Passes of the recorder's own happen in every step, and that walk would be most of their overhead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn


class _Place(NamedTuple):
    """An entry of a module's parameters or buffers, what it holds, and the name that this has."""

    holder: dict[str, Tensor | None]
    key: str
    tensor: Tensor
    name: str


def _holders(module: nn.Module) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    # The module's own dictionaries: setattr would look at every kind of attribute first.
    return module._parameters, module._buffers  # type: ignore[return-value]


class Places:
    """The places in which a module and its parts hold their tensors.

    Found once, and again when something else is held.

    Args:
        net: the module; it is changed only inside of ``swapped``.
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
        """Return parameters and buffers by name; what is held twice comes once."""
        # Tied weights are one tensor under the first of their names: swapped once, tied they stay.
        if any(holder.get(key) is not tensor for holder, key, tensor, _ in self._places):
            self._places = self._find()
        return {name: tensor for _, _, tensor, name in self._places}

    @contextmanager
    def swapped(self, state: dict[str, Tensor]) -> Iterator[None]:
        """Let the module hold the tensors of ``state`` inside, and its own again after.

        Buffers that it assigns inside go into ``state``; what ``state`` lacks stays as it is.

        Args:
            state: tensors by the names of ``tensors``; it is written to.
        """
        places = [place for place in self._places if place.name in state]
        for holder, key, _, name in places:
            holder[key] = state[name]
        try:
            yield
        finally:
            for holder, key, tensor, name in places:
                # Running statistics may be assigned rather than written to.
                held = holder[key]
                if held is not None:
                    state[name] = held
                holder[key] = tensor
