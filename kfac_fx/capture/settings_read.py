"""Plain values that a model's code reads from objects: settings within settings, classes, closures.

An object that a module knows may hold a whole program (a trainer) and change in every step. So only
those of its attributes are looked at whose names stand in the code of the model.
"""

from __future__ import annotations

import logging
import operator
import os
import sys
import threading
import types
import weakref
from collections.abc import Collection, Iterable, Iterator
from contextvars import ContextVar
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfac_fx.capture.changes import Place
from kfac_fx.capture.code_names import is_installed, modules_in, names_in
from kfac_fx.capture.is_questions import asks_for_ties
from kfac_fx.capture.kept_state import Plain
from kfac_fx.capture.object_states import (
    BAGS,
    HOLDERS,
    SCALARS,
    bytes_of,
    memory_of,
    version,
)

Value = Any
"""Whatever an attribute of the user's holds."""

_DEPTH = 8
"""How many objects one within the other are looked into."""
_SMALL = 1_000
"""Entries of a NumPy array that is compared at each call; longer ones are data."""

CODE = (types.FunctionType, types.BuiltinFunctionType, type)
"""What a name in the model's code may stand for besides values, and for other code later."""

_ATOMS = (*SCALARS, *CODE, Enum, torch.dtype, torch.device)
"""Values that are compared as they are."""


_BARE = (types.SimpleNamespace, threading.local)
"""Bare bags of attributes, which code asks for what is not there yet: ``getattr(bag, "k", 1)``."""


_ENVIRONMENT = frozenset({"environ", "environb", "getenv", "getenvb"})
_LEVELS = frozenset({"isEnabledFor", "getEffectiveLevel", "level", "disabled"})
"""Names by which code asks the environment, and a logger whether it listens."""


class Setting(NamedTuple):
    """A value that is read anew to be compared.

    Attributes:
        space: has a method ``get``, from the name to the present value.
        name: what is read.
        words: says to the user where it is.
    """

    space: Value
    name: str
    words: str


class _Attributes:
    """Attributes of an object or a class."""

    def __init__(self, owner: Value) -> None:
        self._owner = owner

    def get(self, name: str) -> Value:
        return getattr(self._owner, name, None)


class _Whole:
    """What stands for a whole: the value of a context variable, closure, array or tensor."""

    def __init__(self, owner: Value) -> None:
        self._owner = owner

    def get(self, _: str) -> Value:
        owner = self._owner
        if isinstance(owner, ContextVar):
            return owner.get(None)
        if isinstance(owner, types.CellType):
            return owner.cell_contents
        if isinstance(owner, logging.Logger):
            return owner.getEffectiveLevel(), owner.manager.disable, owner.disabled
        if isinstance(owner, Tensor):
            return version(owner), owner.data_ptr()
        return bytes_of(owner) if memory_of(owner) is not None else owner.tobytes()


def _space_of(owner: Value, name: str) -> Value:
    """Return where an attribute is read: the dictionary of a class if it surely comes from there.

    A dictionary answers in a sixth of the time, and a large model's code names some hundred. That
    of an object may be replaced by another one.
    """
    kind: Value = type(owner)
    plain = isinstance(owner, type) and kind.__getattribute__ is type.__getattribute__
    # A property of the metaclass would come before what the class holds.
    if plain and name in vars(owner) and not hasattr(getattr(kind, name, None), "__set__"):
        return vars(owner)
    return _Attributes(owner)


def of_cell(cell: types.CellType, name: str, words: str) -> Setting:
    """Return the value that a function closes over, as a setting."""
    return Setting(_Whole(cell), name, words)


def of_values(tensor: Tensor, words: str) -> Setting:
    """Return the values of a tensor as a setting: how often they were written, and where."""
    return Setting(_Whole(tensor), words, f"the values of {words}")


class _Ties:
    """Which of a model's tensors are one object, each by the place of the first.

    Args:
        held: dictionaries of modules with their tensors.
    """

    def __init__(self, held: list[dict[str, Tensor | None]]) -> None:
        self._held = held

    def get(self, _: str) -> Value:
        first: dict[int, int] = {}
        every = [tensor for held in self._held for tensor in held.values()]
        return Plain(first.setdefault(id(one), place) for place, one in enumerate(every))


def of_ties(
    held: list[dict[str, Tensor | None]], found: Collection[types.FunctionType | type]
) -> Iterator[Setting]:
    """Yield which tensors are one, as a setting, where code asks for it: ``a.w is b.w``.

    Args:
        held: dictionaries of modules with their tensors.
        found: the functions and classes of the model's code.
    """
    if any(asks_for_ties(one.__code__) for one in found if not isinstance(one, type)):
        yield Setting(_Ties(held), "ties", "which parameters are one")


_BODY = operator.attrgetter("__code__", "__defaults__")
_BASES = operator.attrgetter("__mro__")


class _Code:
    """The bodies and defaults of functions, and the bases of classes.

    A notebook that loads code anew writes it into the functions that there are.
    """

    def __init__(self, found: Collection[types.FunctionType | type]) -> None:
        functions = [one for one in found if isinstance(one, types.FunctionType)]
        # A model is made before it is captured.
        run = [one for one in functions if one.__name__ != "__init__"]
        self._functions = [one for one in run if not is_installed(one.__code__)]
        self._classes = [one for one in found if isinstance(one, type) and not is_installed(one)]

    def get(self, _: str) -> Value:
        return Plain((*map(_BODY, self._functions), *map(_BASES, self._classes)))


def of_code(found: Collection[types.FunctionType | type]) -> Setting:
    """Return the code of functions and classes as a setting; that of libraries stays what it is."""
    return Setting(_Code(found), "code", "the code of a function or class")


def of_torch(function: types.FunctionType) -> Iterator[Setting]:
    """Yield the functions of torch's modules that code names: other kernels are set in their place.

    Args:
        function: the code.
    """
    names = {*names_in(function.__code__)}
    for module in modules_in(function, of_torch=True):
        space = vars(module)
        for name in space.keys() & names:
            if isinstance(space[name], CODE):
                yield Setting(space, name, f"{module.__name__}.{name}")


def of_layers(modules: Iterable[nn.Module]) -> Iterator[Setting]:
    """Yield the ``forward`` of torch's own layers that a graph has run and calls no more."""
    for base in dict.fromkeys(base for module in modules for base in type(module).__mro__):
        if base.__module__.startswith("torch.nn.") and "forward" in vars(base):
            yield Setting(vars(base), "forward", f"{base.__name__}.forward")


def held_by_classes(
    found: Iterable[types.FunctionType | type], names: Collection[str]
) -> Iterator[tuple[Value, Place]]:
    """Yield what the model's classes hold for all instances, and where.

    Args:
        found: the classes, functions aside.
        names: those that stand in the model's code.
    """
    for kind in found:
        if isinstance(kind, type):
            for name in vars(kind).keys() & names:
                yield vars(kind)[name], Place("", f"{kind.__name__}.{name}")


class _Environment:
    """All variables of the process's environment: code may put their names together."""

    def get(self, _: str) -> Value:
        return Plain(os.environ.items())


def of_environment(names: Collection[str]) -> Iterator[Setting]:
    """Yield the environment as a setting, where code with these names can read it."""
    if not _ENVIRONMENT.isdisjoint(names):
        yield Setting(_Environment(), "os.environ", "the environment (os.environ)")


class _Gradients:
    """Whether parameters ask for gradients, by name."""

    def __init__(self, held: dict[str, Tensor | None]) -> None:
        self._held = held

    def get(self, name: str) -> bool | None:
        parameter = self._held.get(name)
        return None if parameter is None else parameter.requires_grad


def of_gradients(model: nn.Module) -> Iterator[Setting]:
    """Yield whether each parameter of a model asks for gradients, as a setting."""
    for path, module in model.named_modules():
        held = vars(module)["_parameters"]
        for name in held:
            words = ".".join(part for part in (path, name) if part)
            yield Setting(_Gradients(held), name, f"requires_grad of {words}")


class _Tags:
    """The attributes that parameters and buffers have been given, of those that code names.

    Args:
        held: dictionaries of modules with their tensors.
        names: those that stand in the model's code.
    """

    def __init__(self, held: list[dict[str, Tensor | None]], names: Collection[str]) -> None:
        self._held = held
        self._names = frozenset(names)

    def get(self, _: str) -> Value:
        # Most tensors have none, and this is in every call.
        tagged = [t for held in self._held for t in held.values() if t is not None and t.__dict__]
        return Plain(
            (place, name, value if isinstance(value, _ATOMS) else id(value))
            for place, tensor in enumerate(tagged)
            for name, value in tensor.__dict__.items()
            if name in self._names
        )


def of_tags(held: list[dict[str, Tensor | None]], names: Collection[str]) -> Setting:
    """Return what a model's code may ask its tensors for besides values, as a setting.

    Args:
        held: dictionaries of modules with their tensors.
        names: those that stand in the model's code.
    """
    return Setting(_Tags(held, names), "attributes", "attributes of parameters or buffers")


def settings_of(
    value: Value, words: str, names: Collection[str], seen: dict[int, Value], depth: int = 0
) -> Iterator[Setting | tuple[Value, str]]:
    """Yield what code may read of an object, and the containers in it with their place in words.

    Args:
        value: what an attribute of a module, or a global, holds.
        words: where.
        names: those that stand in the model's code.
        seen: objects that were looked at, by their identities; is added to. A property may make one
            for the moment, and another object would get its identity and be passed over.
        depth: how many objects this one is within.
    """
    if isinstance(value, weakref.ref):
        value, words = value(), f"{words}()"
    if isinstance(value, (*HOLDERS, tuple)):
        yield value, words
        return
    if isinstance(value, BAGS) and (wrapped := vars(value).get("data")) is not None:
        yield wrapped, words  # a mapping of the standard library
        return
    if isinstance(value, ContextVar):
        yield Setting(_Whole(value), value.name, f"the context variable {value.name}")
        return
    if _is_small_array(value):
        yield Setting(_Whole(value), words, words)
        return
    if isinstance(value, logging.Logger):
        if not _LEVELS.isdisjoint(names):
            yield Setting(_Whole(value), value.name, f"the level of the logger {value.name}")
        return
    if id(value) in seen or depth > _DEPTH or not _looked_into(value):
        return
    seen[id(value)] = value
    for name in names:
        try:
            held = getattr(value, name, None)
        except Exception:  # a property of the user's may need what is not there
            continue
        if held is None and not hasattr(value, name) and not isinstance(value, _BARE):
            continue
        inner = f"{words}.{name}"
        # Methods of C classes stay what they are; one that a user has put there may be replaced.
        if isinstance(held, types.BuiltinFunctionType) and name not in getattr(
            value, "__dict__", ()
        ):
            continue
        if isinstance(held, _ATOMS):
            yield Setting(_space_of(value, name), name, inner)
        elif isinstance(held, (*HOLDERS, nn.Module)):
            yield held, inner
        elif not callable(held) or isinstance(held, weakref.ref):
            yield from settings_of(held, inner, names, seen, depth + 1)


def _is_small_array(value: Value) -> bool:
    memory = memory_of(value)
    if memory is not None:
        return memoryview(memory).nbytes <= 8 * _SMALL
    numpy = sys.modules.get("numpy")
    return (
        numpy is not None
        and isinstance(value, numpy.ndarray)
        and value.size <= _SMALL
        and value.dtype != object
    )


def _looked_into(value: Value) -> bool:
    """Tell whether a value is an object or a class of the user's, or a bare bag of attributes."""
    if isinstance(value, _BARE):
        return True
    if isinstance(value, (*SCALARS, *HOLDERS, tuple, Tensor, nn.Module, Enum)):
        return False
    if isinstance(value, (types.ModuleType, types.FunctionType, types.MethodType)):
        return False
    kind = value if isinstance(value, type) else type(value)
    if issubclass(kind, (nn.Module, torch.autograd.Function, Enum)):
        return False
    return kind.__module__.split(".")[0] not in ("torch", "numpy", *sys.stdlib_module_names)
