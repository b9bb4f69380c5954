"""Values that are equal and yet not the same to code: ``2`` and ``2.0``, ``True`` and ``1``.

Containers are compared by their equality, which C code does fast. A number of another class makes
results of another dtype all the same, and a class of the user's may call equal what differs in a
field. Such entries are known by their identity here, and looked into where that is another one.
"""

from __future__ import annotations

import enum
import types
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfac_fx.capture.kept_state import TENSORS, Kept, Plain, Watched, same

Value = Any
"""What a container or a setting holds."""

_PLAIN = (dict, list, OrderedDict, types.MappingProxyType)
"""Classes of containers whose entries are read as they are."""

_SAFE = (
    str,
    bytes,
    type(None),
    type,
    Tensor,
    nn.Module,
    enum.Enum,
    torch.dtype,
    torch.device,
    types.BuiltinFunctionType,
    types.MethodType,
    Plain,
)
"""Classes of values that are equal only where they are the same to code."""

_MOST = 64
"""Entries of a list or dictionary of the user's that are looked at; longer ones are data."""

_OF_TORCH = frozenset({*vars(nn.Module()), *TENSORS})


class Exactness:
    """Know the entries of watched containers and settings that equality alone does not tell apart.

    Args:
        containers: those that are watched.
        kept: what they held, and the values of the settings.
    """

    def __init__(self, containers: Sequence[Watched], kept: Kept) -> None:
        self._entries = [*_entries(containers, kept.containers)]
        numbered = enumerate(kept.values)
        self._settings = [(place, value) for place, value in numbered if _may_differ(value)]
        # A loop over a dictionary runs in its order, which equality does not ask for.
        self._ordered: list[Watched] = [
            held
            for held, copied in zip(containers, kept.containers, strict=True)
            if type(held) in (dict, OrderedDict)
            and 1 < len(held) <= _MOST
            and "_modules" not in copied
        ]
        self._orders = [[*held] for held in self._ordered]

    def holds(self, settings: Sequence[Value]) -> bool:
        """Tell whether all are what they were; they are known to be equal.

        Args:
            settings: the present values of the settings.
        """
        # This is in every call: loops that make nothing new cost some thirty nanoseconds an entry.
        for held, key, value in self._entries:
            if held[key] is not value and not same(held[key], value):
                return False
        for place, value in self._settings:
            if settings[place] is not value and not same(settings[place], value):
                return False
        return [*map(list, self._ordered)] == self._orders


def _entries(
    containers: Sequence[Watched], copies: Sequence[Watched]
) -> Iterator[tuple[Watched, Value, Value]]:
    """Yield the container, the key and the value of each entry that is to be looked at."""
    for container, copied in zip(containers, copies, strict=True):
        if type(container) not in _PLAIN:
            continue
        module = isinstance(copied, dict) and "_modules" in copied
        if not module and len(copied) > _MOST and not isinstance(container, types.MappingProxyType):
            continue
        for key, value in copied.items() if isinstance(copied, dict) else enumerate(copied):
            if not (module and key in _OF_TORCH) and _may_differ(value):
                yield container, key, value


def _may_differ(value: Value) -> bool:
    """Tell whether another value may be equal to this one and do something else."""
    kind: Value = type(value)
    return kind.__eq__ is not object.__eq__ and not isinstance(value, _SAFE)
