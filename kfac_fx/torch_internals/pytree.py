"""Nested containers of tensors: flatten, rebuild, and map over their leaves.

Why: outputs and batches of users are nested in ways that torch.export and torch.compile know.
No public way: ``torch.utils._pytree`` is where classes are registered for those two, and torch
2.11 has no public name for it. Seen on torch 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils import _pytree
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

__all__ = ["TreeSpec", "tree_flatten", "tree_leaves", "tree_map", "tree_map_only", "tree_unflatten"]


Value = Any
"""A leaf, or any nesting of containers."""


def tree_map(change: Callable[[Value], Value], tree: Value) -> Value:
    """Return the same nesting with changed leaves.

    torch makes named tuples anew by their class, which may have a ``__new__`` that takes other
    arguments; here they are filled in as they are.

    Args:
        change: from a leaf to what takes its place.
        tree: a leaf or a nesting.
    """

    def changed(value: Value) -> Value:
        if _is_named_tuple(value):
            return tuple.__new__(type(value), [tree_map(change, item) for item in value])
        return change(value)

    return _pytree.tree_map(changed, tree, is_leaf=_is_named_tuple)


def tree_map_only(kind: type, change: Callable[[Value], Value], tree: Value) -> Value:
    """Return the same nesting with those leaves changed that are of one class.

    Args:
        kind: the class.
        change: from a leaf of it to what takes its place.
        tree: a leaf or a nesting.
    """
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, kind) else leaf, tree)


def _is_named_tuple(value: Value) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")
