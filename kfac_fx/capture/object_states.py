"""Objects that are no containers and keep what a forward may change: to read and to put back."""

from __future__ import annotations

import array
import collections
import ctypes
import functools
import pickle
import queue
import random
import sys
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from multiprocessing import sharedctypes
from typing import Any, NamedTuple

import torch

Value = Any
"""What a module holds under a name."""

_LARGE = 1_000_000
"""Entries of an array above which it is not copied."""

SCALARS = (bool, int, float, complex, str, bytes, type(None))
"""Values that cannot be changed in their place and that can be compared safely."""

HOLDERS = (dict, list, set, collections.deque)
"""Containers that code changes in their place."""

_BUILT_IN = (dict, list, tuple, set, collections.deque)


def entries(container: Value) -> Sequence[Value]:
    """Return what a container holds, the values of a dictionary, as its built-in class has it.

    A user's subclass may mean something else by its length and its items: the representations of
    e3nn are tuples whose length is an error, and a table may make new values whenever it is read.

    Args:
        container: an instance of one of ``HOLDERS`` or a tuple.
    """
    kind = type(container)
    if kind is list or kind is tuple:
        return container  # type: ignore[no-any-return]
    base = next(base for base in _BUILT_IN if isinstance(container, base))
    return [*(dict.values(container) if base is dict else base.__iter__(container))]


BAGS = (
    types.SimpleNamespace,
    threading.local,
    queue.Queue,
    collections.UserDict,
    collections.UserList,
    weakref.WeakKeyDictionary,
    weakref.WeakValueDictionary,
)
"""Classes of the standard library that are there to hold what is the user's, in attributes."""

_C_DATA = (ctypes.Array, ctypes.Structure, ctypes.Union, type(ctypes.c_int()).__mro__[1])
"""Values in C's form, as ``multiprocessing`` shares them."""

_MEMORY = (array.array, bytearray, *_C_DATA)


class _Stateful(NamedTuple):
    """How the state of a kind of object is read and put back; states can be compared.

    Attributes:
        read: from the object to its state.
        write: from the object and a state.
    """

    read: Callable[[Value], bytes]
    write: Callable[[Value, bytes], None]


def memory_of(value: Value) -> Value:
    """Return the plain memory that a value is, None for all others.

    A value that ``multiprocessing`` shares under a lock stands for the one within it.
    """
    if isinstance(value, sharedctypes.SynchronizedBase):
        value = value.get_obj()
    return value if isinstance(value, _MEMORY) else None


def bytes_of(value: Value) -> bytes:
    """Return what stands in the memory that a value is (see ``memory_of``)."""
    return bytes(memory_of(value))


def _write_memory(value: Value, state: bytes) -> None:
    memory = memory_of(value)
    if isinstance(memory, array.array):
        memory[:] = array.array(memory.typecode, state)
    elif isinstance(memory, bytearray):
        memory[:] = state
    else:
        ctypes.memmove(ctypes.addressof(memory), state, len(state))


@functools.lru_cache(maxsize=1024)
def _may_have_state(kind: type) -> bool:
    """Tell whether an object of a class may be a random generator or an array.

    Tens of thousands of modules, functions and plain values are asked in every capture.
    """
    kinds = (torch.Generator, random.Random, sharedctypes.SynchronizedBase, *_MEMORY)
    modules = {str(base.__module__).split(".")[0] for base in kind.__mro__}
    return issubclass(kind, kinds) or "numpy" in modules


def _stateful(value: Value) -> _Stateful | None:
    """Return how to read a random generator or a small array, None for other objects."""
    if not _may_have_state(type(value)):  # type: ignore[arg-type]  # mypy: no class has a hash
        return None
    if isinstance(value, torch.Generator):
        return _Stateful(
            lambda v: bytes(v.get_state().tolist()),
            lambda v, s: void(v.set_state(torch.tensor(list(s), dtype=torch.uint8))),
        )
    if isinstance(value, random.Random):
        return _Stateful(
            lambda v: pickle.dumps(v.getstate()), lambda v, s: v.setstate(pickle.loads(s))
        )
    memory = memory_of(value)
    if memory is not None:
        small = memoryview(memory).nbytes < _LARGE
        return _Stateful(bytes_of, _write_memory) if small else None
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.random.Generator):
        return _Stateful(
            lambda v: pickle.dumps(v.bit_generator.state),
            lambda v, s: setattr(v.bit_generator, "state", pickle.loads(s)),
        )
    if isinstance(value, numpy.random.RandomState):
        return _Stateful(
            lambda v: pickle.dumps(v.get_state()), lambda v, s: v.set_state(pickle.loads(s))
        )
    if isinstance(value, numpy.ndarray) and value.size < _LARGE and value.dtype != object:
        return _Stateful(
            lambda v: bytes(v.tobytes()),
            lambda v, s: v.__setitem__(..., numpy.frombuffer(s, v.dtype).reshape(v.shape)),
        )
    return None


def void(_: Value) -> None:
    """Return nothing, whatever is given."""


def state_of(value: Value) -> bytes | None:
    """Return the state of a random generator or a small array, None for other objects."""
    found = _stateful(value)
    return None if found is None else found.read(value)


def set_state(value: Value, state: bytes) -> None:
    """Put a generator or an array back."""
    found = _stateful(value)
    assert found is not None
    found.write(value, state)


class Slots:
    """The attributes of an object that has places for them and no dictionary.

    Args:
        owner: the object.
    """

    def __init__(self, owner: Value) -> None:
        self.owner = owner
        self._names = slots_of(owner)

    def get(self) -> dict[str, Value]:
        """Return those that are filled, by name."""
        return {name: getattr(self.owner, name) for name in self._names if self._filled(name)}

    def set(self, contents: dict[str, Value]) -> None:
        """Give the object the attributes that it had."""
        for name in self._names:
            if name in contents:
                object.__setattr__(self.owner, name, contents[name])
            elif self._filled(name):
                object.__delattr__(self.owner, name)

    def _filled(self, name: str) -> bool:
        try:
            object.__getattribute__(self.owner, name)
        except AttributeError:
            return False
        return True


def slots_of(value: Value) -> list[str]:
    """Return the names of the places that the classes of an object have made for attributes."""
    found: list[str] = []
    for kind in type(value).__mro__:
        held = vars(kind).get("__slots__", ())
        for name in (held,) if isinstance(held, str) else held:
            if isinstance(vars(kind).get(name), types.MemberDescriptorType):
                found.append(name)
    return found


def version(tensor: torch.Tensor) -> int:
    """Return how often a tensor was written to; inference tensors do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def attributes_of(value: Value) -> dict[str, object] | None:
    """Return the attributes of a user's plain object (a configuration), None for all others."""
    skipped = (torch.Tensor, type, types.ModuleType, types.FunctionType, types.MethodType)
    if isinstance(value, skipped) or type(value).__module__.split(".")[0] == "torch":
        return None
    found = getattr(value, "__dict__", None)
    return found if isinstance(found, dict) else None
