"""Calls of a running model that a tap would not see as they count: checkpoints and vmap."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import torch
from torch.utils.checkpoint import CheckpointFunction


def activation_checkpoint() -> None:
    """Stands in a recorded graph for uses that the backward pass computes again."""


def function_transform() -> None:
    """Stands in a recorded graph for uses inside torch.vmap and its like, which hide the cases."""


def hidden_by() -> Callable[[], None] | None:
    """Why a tap would not see what the call does, as the function that stands for it."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return function_transform
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    recomputed = hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
    return activation_checkpoint if recomputed else None


def computed_later() -> bool:
    """Whether the call is in a reentrant checkpoint, whose backward runs it with gradients."""
    forward = CheckpointFunction.forward.__code__
    return any(frame.f_code is forward for frame, _ in traceback.walk_stack(None))
