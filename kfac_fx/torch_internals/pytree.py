"""Nested containers of tensors: flatten, rebuild, and map over their leaves.

Why: outputs and batches of users are nested in ways that torch.export and torch.compile know.
No public way: ``torch.utils._pytree`` is where classes are registered for those two, and torch
2.11 has no public name for it. Seen on torch 2.11, 2.13 and 2.14.
"""

from torch.utils._pytree import (
    TreeSpec,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)

__all__ = ["TreeSpec", "tree_flatten", "tree_leaves", "tree_map", "tree_map_only", "tree_unflatten"]
