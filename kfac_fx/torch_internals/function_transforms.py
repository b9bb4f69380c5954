"""Tell whether torch.func transforms (vmap, grad, jvp) are active, and unwrap their tensors.

Why: a tap inside torch.vmap sees one tensor for all cases of a batch, so it must know that it is
there; and ``torch.autograd.Function.apply`` may take a shorter way where no transform is active.
No public way: torch.func has no question "is a transform active", nor one for the tensor inside its
wrappers. Seen on torch 2.11 and 2.13.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

__all__ = [
    "forward_level",
    "inside_transform",
    "transforms_active",
    "unwrap_dead_wrappers",
    "unwrapped",
]


def inside_transform() -> bool:
    """Tell whether the code runs inside a function that torch.func transforms.

    A backward pass that runs while the transform is suspended does not count, unlike in
    ``transforms_active``.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


def transforms_active() -> bool:
    """Tell whether torch's dispatcher has a torch.func layer switched on."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the tensor inside all wrappers that torch.func put around it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def forward_level() -> int:
    """Return the level of forward-mode differentiation, -1 outside of it."""
    level: int = forward_ad._current_level
    return level
