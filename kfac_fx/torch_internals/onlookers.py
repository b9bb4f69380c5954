"""Tell who looks on while an operator runs: compilers, modes, torch.func transforms, saving hooks.

Why: taps take shorter ways (writing into a buffer, keeping a row for later) that none of these may
see. A compiler must see every operator; a tap inside torch.vmap sees one tensor for all cases of a
batch; inside an activation checkpoint a call runs twice, and what its first run records is computed
again. No public way: torch.func has no question whether a transform is active, and
``saved_tensors_hooks`` and ``TorchDispatchMode`` can be entered but not asked for. Seen on torch
2.11, 2.13 and 2.14.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = [
    "dispatch_mode",
    "forward_mode",
    "inside_transform",
    "module_hooks",
    "pack_hook",
    "packed_by_checkpoint",
    "saved_elsewhere",
    "traced",
    "transforms_active",
    "unwrap_dead_wrappers",
    "unwrapped",
    "watched",
]


# Bound without a wrapper: a tap asks these several times a step.
transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Tell whether torch's dispatcher has a torch.func layer switched on."""

dispatch_mode: Callable[[], object | None] = _get_current_dispatch_mode
"""Return the mode that sees every operator at present, None where there is none."""


def traced() -> bool:
    """Tell whether a compiler looks on, or another mode that sees every operator."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


module_hooks: Callable[[], bool] = _has_any_global_hook
"""Tell whether hooks run around the forward of every module."""


def watched() -> bool:
    """Tell whether a compiler, a mode, fx or a transform looks on, who must see every call."""
    return (
        torch.compiler.is_compiling()
        or _symbolic_trace.is_fx_symbolic_tracing()  # the flag behind it moved in torch 2.14
        or _get_current_dispatch_mode() is not None
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def inside_transform() -> bool:
    """Tell whether the code runs inside a function that torch.func transforms.

    While a transform's own layer is being run, it is off the stack: ``transforms_active`` counts
    what torch's dispatcher would still go through.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


def forward_mode() -> bool:
    """Tell whether tensors may have tangents, or be wrapped by a transform."""
    # Either is enough: torch.autograd.forward_ad has levels, torch.func has its own stack.
    level: int = forward_ad._current_level
    return level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the tensor inside all wrappers that torch.func put around it."""
    # A loop, as transforms nest: jvp of jvp wraps twice.
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def pack_hook() -> Callable[[Tensor], object] | None:
    """Return the function that packs what autograd saves at present, None where nothing does."""
    # False: hooks count as well while they are disabled for tracing.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]


def saved_elsewhere() -> bool:
    """Tell whether what autograd saves is packed: by a checkpoint, or to be held elsewhere."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def packed_by_checkpoint() -> bool:
    """Tell whether the code runs in an activation checkpoint that does not reenter autograd."""
    hook = pack_hook()
    return hook is not None and hook.__module__ == "torch.utils.checkpoint"
