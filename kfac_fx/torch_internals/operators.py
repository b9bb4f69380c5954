"""Tell kinds of operators in a graph apart: ATen's overloads, and those that run nested graphs.

Why: the rules read an ATen overload's arguments in another order than those of a torch function,
and a nested graph that reads parameters cannot be looked into. No public way: the classes have no
public name. Seen on torch 2.11 and 2.13.
"""

from __future__ import annotations

import torch
from torch._ops import HigherOrderOperator, OpOverload

ASSERTION = torch._assert
"""The function that stands for ``assert`` in traced code; it reads a value and makes none."""


def is_overload(target: object) -> bool:
    """Tell whether a target is one overload of an operator, as ``torch.ops.aten.mm.default`` is."""
    return isinstance(target, OpOverload)


def runs_nested_graph(target: object) -> bool:
    """Tell whether a target is a higher-order operator, which is given graphs to run."""
    return isinstance(target, HigherOrderOperator)


def qualified_name(target: object) -> str | None:
    """Return an operator's name with its namespace ("aten::mm"), None for other functions."""
    return getattr(getattr(target, "_schema", None), "name", None)
