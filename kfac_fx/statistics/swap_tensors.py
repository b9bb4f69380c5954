"""Other tensors in the place of a module's own, for the time of a call.

``torch.func.functional_call`` does the same, and walks through the module for it at every call.
Passes of the recorder's own happen in every step, and that walk would be most of their overhead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

_DEPTH = 3
"""Containers within containers of a module's attributes that are looked into."""


class _Place(NamedTuple):
    """An entry of a module's parameters or buffers, what it holds, and the name that this has."""

    holder: dict[str, Tensor | None]
    key: str
    tensor: Tensor
    name: str


class _Copy(NamedTuple):
    """An entry of a list or dictionary of the user's that holds a parameter, too."""

    holder: dict[Any, Any] | list[Any]
    key: Any
    tensor: Tensor
    name: str


def _holders(module: nn.Module) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    # The module's own dictionaries: setattr would look at every kind of attribute first.
    return module._parameters, module._buffers  # type: ignore[return-value]


def _is_there(copy: _Copy) -> bool:
    """Tell whether a container still holds what it held."""
    try:
        return copy.holder[copy.key] is copy.tensor
    except (KeyError, IndexError):
        return False


class Places:
    """The places in which a module and its parts hold their tensors.

    Found once, and again when something else is held.

    Args:
        net: the module; it is changed only inside of ``swapped``.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._places = self._find()
        self._copies = self._find_copies()

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

    def _find_copies(self) -> list[_Copy]:
        """Return where else the modules hold parameters that they have registered.

        A cell may read all its weights from a dictionary of its own (``self.weights["w"]``): a pass
        that swapped the registered ones alone would run with the old ones, and no derivative of it
        would come to the new ones.
        """
        names = {id(p): name for name, p in self._net.named_parameters()}
        found: list[_Copy] = []
        seen: set[int] = set()

        def look(value: object, depth: int) -> None:
            if id(value) in seen or depth > _DEPTH or type(value) not in (dict, list, tuple):
                return
            seen.add(id(value))
            holder = cast("dict[Any, Any] | list[Any]", value)
            for key, item in holder.items() if isinstance(holder, dict) else enumerate(holder):
                if isinstance(item, nn.Module):
                    # No submodule: a running model is held out of sight of its net.
                    look(vars(item), depth)
                elif not isinstance(item, nn.Parameter) or id(item) not in names:
                    look(item, depth + 1)
                elif not isinstance(value, tuple):
                    found.append(_Copy(holder, key, item, names[id(item)]))

        modules = [*self._net.modules()]
        for module in modules:
            seen |= {id(own) for own in (*_holders(module), module._modules)}
        for module in modules:
            look(vars(module), 0)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers by name; what is held twice comes once."""
        # Tied weights are one tensor under the first of their names: swapped once, tied they stay.
        if any(holder.get(key) is not tensor for holder, key, tensor, _ in self._places):
            self._places = self._find()
            self._copies = self._find_copies()
        return {name: tensor for _, _, tensor, name in self._places}

    @contextmanager
    def swapped(self, state: dict[str, Tensor]) -> Iterator[None]:
        """Let the module hold the tensors of ``state`` inside, and its own again after.

        Buffers that it assigns inside go into ``state``; what ``state`` lacks stays as it is.

        Args:
            state: tensors by the names of ``tensors``; it is written to.
        """
        places = [place for place in self._places if place.name in state]
        copies = [copy for copy in self._copies if copy.name in state and _is_there(copy)]
        for holder, key, tensor, name in places:
            holder[key] = state[name]
            # What the user's code has written on a parameter (mamba's ``_no_weight_decay``): it may
            # read that, and a captured graph compares it at every call.
            if tags := vars(tensor):
                vars(state[name]).update(tags)
        for copy in copies:
            copy.holder[copy.key] = state[copy.name]
        try:
            yield
        finally:
            for copy in copies:
                copy.holder[copy.key] = copy.tensor
            for holder, key, tensor, name in places:
                # Running statistics may be assigned rather than written to.
                held = holder[key]
                if held is not None:
                    state[name] = held
                holder[key] = tensor
