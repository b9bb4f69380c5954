"""What looks on while an operator runs: compilers, transforms of torch.func, hooks of autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode


def traced() -> bool:
    """Return whether a compiler looks on, or another mode that sees every operator."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def forward_mode() -> bool:
    """Return whether tensors may have tangents, or be wrapped by a transform of torch.func."""
    level: int = forward_ad._current_level
    return level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def functional(rows: Tensor) -> bool:
    """Return whether rows must go through operators that write into nothing.

    A graph, a derivative and a transform all need a result that is a function of its arguments.
    """
    return (
        torch.compiler.is_compiling()  # as ``traced`` says; it is asked at every layer
        or _get_current_dispatch_mode() is not None
        or (rows.requires_grad and torch.is_grad_enabled())
        or torch._C._are_functorch_transforms_active()
    )


def saved_elsewhere() -> bool:
    """Return whether what autograd saves is packed: checkpoints, offloading."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
