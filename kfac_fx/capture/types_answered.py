"""``type(x)`` and ``id(p)`` in the user's code, answered as for what a symbolic value stands for.

Python answers both without asking the object: ``type(x) is Tensor`` is False of a proxy, and the
other branch would be taken without a word.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from kfac_fx.capture.code_names import globals_in
from kfac_fx.capture.proxies import Watched, WatchedMember

Value = Any
"""What the user's code asks for its class."""


class _Asked(type):
    """The class of what stands for ``type``: the same in all, but for symbolic values."""

    def __call__(cls, *args: Value, **kwargs: Value) -> Value:
        if len(args) == 1 and issubclass(type(args[0]), Watched):
            return args[0].stands_for()
        return type(*args, **kwargs)

    def __getitem__(cls, item: Value) -> types.GenericAlias:
        return type[item]

    def __instancecheck__(cls, value: Value) -> bool:
        return isinstance(value, type)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, type)


class _Type(type, metaclass=_Asked):
    """Stands for ``type`` in the modules of the user's code."""


def _id(value: Value) -> int:
    """Return what ``id`` does, of a parameter or buffer that of the model's own tensor."""
    if issubclass(type(value), WatchedMember):
        return id(value.param)
    if issubclass(type(value), Watched):
        value.tracer.refuse("the identity (id) of a symbolic value is asked for")
    return id(value)


_ANSWERS = {"type": _Type, "id": _id}


@contextmanager
def types_answered(functions: Iterable[types.FunctionType]) -> Iterator[None]:
    """Within the context, code gets the class of the value that a symbolic one stands for.

    The names are put before the built-in ones in the modules of this code alone: torch's own code
    has to see what a symbolic value is.

    Args:
        functions: the user's.
    """
    spaces = {}
    for function in functions:
        space = function.__globals__
        for name in _ANSWERS.keys() & globals_in(function.__code__) - space.keys():
            spaces[id(space), name] = space
    for (_, name), space in spaces.items():
        space[name] = _ANSWERS[name]
    try:
        yield
    finally:
        for (_, name), space in spaces.items():
            space.pop(name, None)
