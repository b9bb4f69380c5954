"""Records of the user's that a graph makes anew, without the code of their class."""

from __future__ import annotations

from typing import Any

Value = Any
"""A field of a record."""


class Remade:
    """Make a named tuple or an object of a data class of its fields; graphs have it as target.

    fx would call the class. One with a ``__new__`` of its own takes other arguments, and a
    ``__post_init__`` would change values that it has changed already.

    Args:
        kind: the user's class.
        names: of the fields, in the order in which they are given.
    """

    def __init__(self, kind: type, names: tuple[str, ...]) -> None:
        self.kind = kind
        self.names = names
        self.__name__ = f"remade_{kind.__name__}"
        self.__qualname__ = self.__name__
        self.__module__ = __name__

    def __call__(self, *items: Value) -> Value:
        if issubclass(self.kind, tuple):
            return tuple.__new__(self.kind, items)
        made = object.__new__(self.kind)
        for name, item in zip(self.names, items, strict=True):
            object.__setattr__(made, name, item)  # also of a frozen class
        return made

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Remade):
            return False
        return other.kind is self.kind and other.names == self.names

    def __hash__(self) -> int:
        return hash(self.kind)


def makes_itself(kind: type) -> bool:
    """Tell whether a class of named tuples has a ``__new__`` that is not the generated one."""
    scope = getattr(kind.__new__, "__globals__", {})
    return not str(scope.get("__name__")).startswith("namedtuple_")
