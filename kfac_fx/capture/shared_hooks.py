"""Hooks that a captured module and its model have in common."""

from __future__ import annotations

from torch import nn

# There is no public way to hand hooks on with their handles.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""What nn.Module runs around ``forward`` and its derivative."""


class HookSharing(nn.Module):
    """A module that may run the hooks of another; comes before fx's class."""

    # Whether hooks on the backward pass are full ones is written beside them. Whoever registers
    # one, on the model or on the captured module, means both: with two records the other module
    # would call the same hook with other arguments, or not at all.
    @property
    def _is_full_backward_hook(self) -> bool | None:
        owner = self._owner_of_hooks()
        if owner is not self:
            return owner._is_full_backward_hook
        full: bool | None = self.__dict__.get("_is_full_backward_hook")
        return full

    @_is_full_backward_hook.setter
    def _is_full_backward_hook(self, value: bool | None) -> None:
        owner = self._owner_of_hooks()
        if owner is not self:
            owner._is_full_backward_hook = value
        else:
            self.__dict__["_is_full_backward_hook"] = value

    def shares_hooks(self) -> bool:
        """Tell whether the hooks are those of another module."""
        return "_hooks_of" in self.__dict__

    def _owner_of_hooks(self) -> nn.Module:
        owner: tuple[nn.Module] = self.__dict__.get("_hooks_of", (self,))
        return owner[0]


def share_hooks(target: HookSharing, source: nn.Module) -> None:
    """Let ``target`` run the hooks of ``source``, for a capture of ``source.forward`` alone.

    The dictionaries are shared: a hook that is added to the model later runs in the capture too.
    """
    for name in HOOKS:
        target.__dict__[name] = source.__dict__[name]
    target.__dict__["_hooks_of"] = (source,)
