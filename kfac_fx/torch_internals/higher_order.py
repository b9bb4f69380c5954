"""Tell operators that run nested graphs from all others.

Why: a nested graph that reads parameters cannot be looked into, so its uses must not go unseen.
No public way: the class of higher-order operators has no public name. Seen on torch 2.11 and 2.13.
"""

from __future__ import annotations

from torch._ops import HigherOrderOperator


def runs_nested_graph(target: object) -> bool:
    """Tell whether a target is a higher-order operator, which is given graphs to run."""
    return isinstance(target, HigherOrderOperator)
