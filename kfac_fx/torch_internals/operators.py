"""Tell kinds of operators in a graph apart: overloads of ATen, and those that run nested graphs.

Why: a nested graph that reads parameters cannot be looked into, so its uses must not go unseen; and
an overload tells by its name which arguments are numbers, and by its schema whose memory it
returns. No public way: the classes have no public name. Seen on torch 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

from torch._ops import HigherOrderOperator, OpOverload


def runs_nested_graph(target: object) -> bool:
    """Tell whether a target is a higher-order operator, which is given graphs to run."""
    return isinstance(target, HigherOrderOperator)


def overload_name(target: object) -> str | None:
    """Return the overload of an operator ("Tensor" of aten.mul.Tensor), None for other targets."""
    return target._overloadname if isinstance(target, OpOverload) else None


def may_share_memory(target: object) -> bool:
    """Tell whether a target is an operator that may return the memory of its first argument.

    Views do, and what writes in place.
    """
    if not isinstance(target, OpOverload) or not target._schema.arguments:
        return False
    return target._schema.arguments[0].alias_info is not None
