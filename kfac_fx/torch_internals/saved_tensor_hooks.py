"""Read the hooks that pack what autograd saves (activation checkpoints, offloading).

Why: inside ``torch.utils.checkpoint`` a call runs twice, and a tap of the first run would count
what is computed again. No public way: ``torch.autograd.graph.saved_tensors_hooks`` sets hooks, and
nothing reads them. Seen on torch 2.11 and 2.13.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pack = Callable[[Tensor], object]


def pack_hook() -> Pack | None:
    """Return the function that packs saved tensors at present, None where nothing packs them."""
    # False: hooks count as well while they are disabled for tracing.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]


def packed_by_checkpoint() -> bool:
    """Tell whether the code runs in an activation checkpoint that does not reenter autograd."""
    hook = pack_hook()
    return hook is not None and hook.__module__ == "torch.utils.checkpoint"
