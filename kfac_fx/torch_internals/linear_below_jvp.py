"""Compute linear layers under torch.func.jvp on the plain tensors below it.

Why: where a layer's input has a tangent and its weight has none, torch adds the products of both,
one of which is a tensor that is known to be zero; the shape of that sum is worked out in Python,
and took half of the time of a small network's forward under two levels of jvp. No public way:
torch's formulas are its own. Seen on torch 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kfac_fx.torch_internals.jvp_levels import (
    innermost_jvp,
    of_parts,
    parts_below,
    without_top_layer,
)

Value = Any
"""An argument or result of a function of torch's."""


class LinearBelowJvp(TorchFunctionMode):
    """Within the context, compute linear layers below the levels of jvp that are on."""

    def __torch_function__(
        self,
        func: Value,
        types: object,
        args: tuple[Value, ...] = (),
        kwargs: Mapping[str, Value] | None = None,
    ) -> Value:
        """Run a call, that of a linear layer once for the value and once for each tangent."""
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


Levels = frozenset[int]
"""Levels of jvp at which a tensor has a tangent, or one of its tangents has."""


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _with_levels(input, weight, bias)[0]


def _with_levels(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Levels]:
    level = innermost_jvp()
    if level is None:
        return F.linear(input, weight, bias), frozenset()
    x, dx = parts_below(input, level)
    w, dw = parts_below(weight, level)
    b, db = (None, None) if bias is None else parts_below(bias, level)
    with without_top_layer():
        value, levels = _with_levels(x, w, b)
        tangent = None
        if dx is not None:
            tangent, own = _with_levels(dx, w)
            if not levels <= own:
                tangent = _with_zeros(tangent, levels)
            levels |= own
        if dw is not None:
            by_weight, own = _with_levels(x, dw, db)
            tangent = by_weight if tangent is None else tangent + by_weight
            levels |= own
        elif db is not None:
            shift = db.to(value.dtype)  # which autocast may have chosen
            tangent = shift.expand_as(value) if tangent is None else tangent + shift
    own = frozenset() if tangent is None else frozenset([level])
    return of_parts(value, tangent, level), levels | own


def _with_zeros(tensor: Tensor, levels: Levels) -> Tensor:
    """Return a tensor with tangents at all of these levels, zeros where it has none.

    Torch's sums have them. A zero is a use of the layer all the same, and counts where uses are
    counted one by one (factors that stand beside cross factors).
    """
    level = innermost_jvp()
    if level is None:
        return tensor
    value, tangent = parts_below(tensor, level)
    with without_top_layer():
        value = _with_zeros(value, levels)
        if tangent is None and level in levels:
            tangent = torch.zeros_like(value)
        if tangent is not None:
            tangent = _with_zeros(tangent, levels)
    return of_parts(value, tangent, level)
