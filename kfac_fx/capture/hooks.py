"""Refuse models whose hooks or calls a graph would lose; a later route runs them as they are."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx, nn
from torch.nn.modules import module as torch_module

from kfac_fx.errors import CaptureError

_GLOBAL_BACKWARD = ("_global_backward_hooks", "_global_backward_pre_hooks")


def refuse_what_traces_lose(model: nn.Module) -> None:
    """Refuse a model whose call is not its class's ``forward``: fx traces that and nothing else.

    Args:
        model: the user's model.

    Raises:
        CaptureError: says what stands in the way.
    """
    if "forward" in vars(model):
        raise CaptureError(f"forward of this {type(model).__name__} was replaced on the instance")
    if type(model).__call__ is not nn.Module.__call__ and not isinstance(model, fx.GraphModule):
        raise CaptureError(f"{type(model).__name__} has a __call__ of its own")


def refuse_backward_hooks(model: nn.Module, live: Collection[str]) -> None:
    """Refuse a model with hooks on the backward pass of what a graph looks into.

    They stand on the inputs and outputs of a module, which are no more where its code is inlined.

    Args:
        model: the user's model.
        live: paths of modules that the graph calls as they are, hooks included.

    Raises:
        CaptureError: names the module.
    """
    if any(getattr(torch_module, name) for name in _GLOBAL_BACKWARD):
        raise CaptureError("there is a global hook on the backward pass of all modules")
    for path, module in model.named_modules():
        if path and path not in live and (module._backward_hooks or module._backward_pre_hooks):
            raise CaptureError(f"{path} has a hook on its backward pass")
