"""Tell whether a tensor is a view of another.

Why: a view that no table names is recognised by running it (``kfac_fx.capture.unnamed_views``).
No public way: tensors on the meta device have no address to compare, and ``_base`` is the one
attribute that says whose memory a view has. Seen on torch 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["is_view_of"]


def is_view_of(tensor: Tensor, root: Tensor) -> bool:
    """Tell whether ``tensor`` is ``root``, which is no view itself, or a view of it."""
    return tensor is root or tensor._base is root
