"""The code that a model's forward may reach beyond its own methods, found without running it.

Functions that its methods name, those in registries, and methods of helpers: of the objects that
its modules hold, of globals and of classes. What they read and write is part of the model.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfac_fx.capture.code_names import (
    CALLS,
    globals_in,
    is_installed,
    is_theirs,
    modules_in,
    names_in,
)
from kfac_fx.capture.object_states import entries

Value = Any
"""What a module, an object or a global holds."""

_IN_CONTAINER = 1_000
"""Entries of a registry that are looked at; longer ones are data."""
_OBJECTS = 2_000
"""Objects that are looked into: a trainer that a module knows holds a whole program."""
_WITHIN = 8
"""How many objects and containers one within the other are looked into."""

_CACHED = type(functools.lru_cache(len))
"""Of a function behind a cache; what another decorator has wrapped is in its closure."""
_WRAPPED = (staticmethod, classmethod, functools.partialmethod)
_QUIET = ("__init_subclass__", "__class_getitem__", "__del__", "__repr__", "__reduce_ex__")
"""Methods that Python calls and no forward does."""


class Call(NamedTuple):
    """A function that may be called.

    Attributes:
        function: the function itself.
        depth: how many calls, one within the other, are looked into from it on.
    """

    function: types.FunctionType
    depth: int


class Reached(NamedTuple):
    """What a forward may reach.

    Attributes:
        calls: the functions, with those of the model's own classes.
        classes: those of helpers; the model's own are not among them.
    """

    calls: list[Call]
    classes: list[type]


def reached(modules: Iterable[nn.Module]) -> Reached:
    """Return what code of these modules may reach.

    Args:
        modules: those whose own code is run, each once.
    """
    return _Walk([*modules]).found()


class _Walk:
    """Follow names from code to code, until no new code is found.

    An object's attribute is followed once its name stands in code that was found.

    Args:
        modules: where the code begins.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._names: set[str] = set()
        self._calls: dict[int, Call] = {}
        self._classes: dict[type, int] = {}
        self._objects: dict[int, tuple[Value, int]] = {}
        self._own = {kind for module in modules for kind in type(module).__mro__}
        self._todo: list[tuple[Value, int, int]] = []
        for kind in self._own:
            if _followed(kind.__module__, kind):
                self._todo += [(value, CALLS, 0) for value in vars(kind).values()]
        for module in modules:
            self._objects[id(module)] = module, CALLS

    def found(self) -> Reached:
        """Return what there is."""
        known = -1
        while known != (known := len(self._calls) + len(self._classes) + len(self._objects)):
            self._follow()
            for held, depth in list(self._objects.values()):
                items = getattr(held, "__dict__", None)
                if isinstance(items, dict):
                    self._todo += [(items[n], depth, 1) for n in self._names.intersection(items)]
            for kind, depth in list(self._classes.items()):
                for name, value in list(vars(kind).items()):
                    implicit = name.startswith("__") and name not in _QUIET
                    if implicit or name in self._names:
                        self._todo.append((value, depth, 1))
        return Reached([*self._calls.values()], [*self._classes])

    def _follow(self) -> None:
        """Look at all that is waiting, and at what it leads to."""
        while self._todo:
            value, depth, within = self._todo.pop()
            if depth <= 0 or within > _WITHIN or isinstance(value, (Tensor, str, int, float)):
                continue
            if isinstance(value, types.FunctionType):
                self._call(value, depth)
            elif isinstance(value, types.MethodType):
                self._todo += [(value.__func__, depth, within), (value.__self__, depth, within)]
            elif isinstance(value, _WRAPPED):
                inner = value.func if isinstance(value, functools.partialmethod) else value.__func__
                self._todo.append((inner, depth, within))
            elif isinstance(value, property):
                self._todo.append((value.fget, depth, within))
            elif isinstance(value, functools.cached_property):
                self._todo.append((value.func, depth, within))
            elif isinstance(value, _CACHED):
                self._todo.append((value.__wrapped__, depth, within))
            elif isinstance(value, functools.partial):
                self._todo += [(value.func, depth, within), (value.args, depth, within)]
            elif isinstance(value, (dict, list, tuple, set)):
                items = entries(value)
                if len(items) <= _IN_CONTAINER:
                    self._todo += [(item, depth, within + 1) for item in items]
            elif isinstance(value, type):
                self._class(value, depth)
            elif not isinstance(value, (nn.Module, types.ModuleType)):
                self._object(value, depth)

    def _call(self, function: types.FunctionType, depth: int) -> None:
        """Take note of a function, and look at what it names."""
        if id(function) in self._calls or not _followed(function.__module__, function.__code__):
            return
        self._calls[id(function)] = Call(function, depth)
        depth -= 1
        space = function.__globals__
        names = {*names_in(function.__code__)}
        self._names |= names
        found = [space[name] for name in globals_in(function.__code__) if name in space]
        for module in modules_in(function):
            found += [vars(module)[name] for name in vars(module).keys() & names]
        for cell in function.__closure__ or ():
            try:
                found.append(cell.cell_contents)
            except ValueError:  # not filled yet
                continue
        self._todo += [(one, depth, 0) for one in found]

    def _object(self, value: Value, depth: int) -> None:
        """Take note of a user's object and of its class."""
        if id(value) in self._objects or len(self._objects) > _OBJECTS:
            return
        if is_theirs(type(value).__module__) or isinstance(value, types.SimpleNamespace):
            self._objects[id(value)] = value, depth
            self._class(type(value), depth)

    def _class(self, kind: type, depth: int) -> None:
        """Take note of a user's class and its bases; the model's own are known."""
        if issubclass(kind, torch.autograd.Function):
            return  # a node that runs its code anew
        for base in kind.__mro__:
            if base not in self._own and _followed(base.__module__, base):
                self._classes.setdefault(base, depth)


def _followed(module: str | None, code: types.CodeType | type) -> bool:
    """Tell whether code is looked into: the user's, and not that of an installed library.

    A library's code names thousands of settings that no user changes, and its caches and registries
    change without a change in what it does.
    """
    return is_theirs(module) and not is_installed(code)
