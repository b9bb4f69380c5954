"""Calls that write to their first argument, and what they write to."""

from __future__ import annotations

import operator

from torch import fx

from kfac_fx.capture.dialect import Target

_SYMBOLS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_BITS = ("and", "or", "xor", "lshift", "rshift")
OPERATORS: frozenset[Target] = frozenset(getattr(operator, f"i{w}") for w in _SYMBOLS + _BITS)
"""Python's operators in place, as ``+=``."""


def writes(node: fx.Node) -> bool:
    """Tell whether a call writes to its first argument."""
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        if (
            node.target in OPERATORS
            or node.target is operator.setitem
            or node.kwargs.get("inplace") is True
        ):
            return True
    else:
        name = str(node.target) if node.op == "call_method" else ""
    name = name.split(".")[0]
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def update_of(node: fx.Node) -> fx.Node:
    """Return the node whose tensor a node returns: its own, or what calls in place wrote to."""
    while writes(node) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def written_in_place(node: fx.Node) -> bool:
    """Tell whether a call writes to a node's tensor, or to what may be a view of it."""
    seen = {node}
    todo = [node]
    while todo:
        here = todo.pop()
        for user in here.users:
            if not user.args or user.args[0] is not here:
                continue
            if writes(user):
                return True
            if user not in seen:
                seen.add(user)
                todo.append(user)
    return False
