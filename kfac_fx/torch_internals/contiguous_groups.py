"""Normalise groups of channels by operators that take derivatives in forward mode.

Why: products with the Fisher are derivatives in forward mode, and torch's formula for that of
``group_norm`` takes a view that images in the format ``channels_last`` do not have: the user's
own, or what a convolution made of them. No public way: the formula is torch's own. Where a version
takes any input, as 2.14 does, the mode is not entered. Seen on torch 2.11 and 2.13.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

Value = Any
"""An argument or result of a function of torch's."""

_NORMS = (
    F.group_norm,
    torch.group_norm,
    torch.native_group_norm,
    torch.ops.aten.group_norm.default,
    torch.ops.aten.native_group_norm.default,
)


class ContiguousGroups(TorchFunctionMode):
    """Within the context, normalise groups of contiguous copies."""

    def __torch_function__(
        self,
        func: Value,
        types: object,
        args: tuple[Value, ...] = (),
        kwargs: Mapping[str, Value] | None = None,
    ) -> Value:
        """Run a call, that of a group norm with a contiguous input."""
        if func in _NORMS and args:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))
