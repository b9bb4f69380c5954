"""Names of members: those that a captured module needs, and those that a model sets its own way."""

from __future__ import annotations

from torch import fx, nn

from kfac_fx.errors import CaptureError


def check_names(model: nn.Module, kind: type[fx.GraphModule]) -> None:
    """Refuse members of a model that an attribute of its captured module would hide.

    Python finds what a class defines before it asks a module for its members, so the graph would
    call a method in the place of a layer, or fx would fail as it sets its own attribute.

    Args:
        model: is about to be captured; a GraphModule has been through this.
        kind: the class of the captured module.

    Raises:
        CaptureError: names the member.
    """
    if isinstance(model, fx.GraphModule):
        return
    taken = {name for name in dir(kind) if not hasattr(nn.Module, name)} | {"meta"}
    for name in (*model._modules, *model._parameters, *model._buffers):
        if name in taken:
            raise CaptureError(
                f"{type(model).__name__} has a member named {name}, which is an attribute of every "
                "captured module: give it another name, or transform a module that holds the "
                "model, such as nn.Sequential(model)"
            )


def sets_itself(kind: type, name: str) -> bool:
    """Tell whether a class says itself what setting an attribute does."""
    held = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
    if hasattr(type(held), "__set__"):
        return True
    own = vars(nn.Module)["__setattr__"] is not getattr(kind, "__setattr__", None)
    return own and name[0] != "_"
