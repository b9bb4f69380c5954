"""``type(x)`` in the user's code, answered for symbolic values as for the values they stand for.

Python answers it without asking the object: ``type(x) is Tensor`` is False of a proxy, and the
other branch would be taken without a word.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from kfac_fx.capture.code_names import globals_in
from kfac_fx.capture.proxies import Watched

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


@contextmanager
def types_answered(functions: Iterable[types.FunctionType]) -> Iterator[None]:
    """Within the context, code gets the class of the value that a symbolic one stands for.

    The name is put before the built-in one in the modules of this code alone: torch's own code has
    to see what a symbolic value is.

    Args:
        functions: the user's.
    """
    spaces = {}
    for function in functions:
        space = function.__globals__
        if "type" not in space and "type" in globals_in(function.__code__):
            spaces[id(space)] = space
    for space in spaces.values():
        space["type"] = _Type
    try:
        yield
    finally:
        for space in spaces.values():
            space.pop("type", None)
