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
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

_functorch = torch._C._functorch

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


def under_jvp() -> bool:
    """Say whether the innermost transform that is on is torch.func.jvp; one call where none is."""
    layer = _functorch.peek_interpreter_stack()
    return layer is not None and layer.key() == _functorch.TransformType.Jvp


Levels = frozenset[int]
"""Levels of jvp at which a tensor has a tangent, or one of its tangents has."""


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _with_levels(input, weight, bias)[0]


def _with_levels(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Levels]:
    if not under_jvp():
        return F.linear(input, weight, bias), frozenset()
    level = _functorch.peek_interpreter_stack().level()
    x, dx = parts_below(input, level)
    w, dw = parts_below(weight, level)
    b, db = (None, None) if bias is None else parts_below(bias, level)
    top = _functorch.pop_dynamic_layer_stack()
    try:
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
    finally:
        _functorch.push_dynamic_layer_stack(top)
    value = _functorch._wrap_for_grad(value, level)
    if tangent is None:
        return value, levels
    dual: Tensor = forward_ad.make_dual(value, _functorch._wrap_for_grad(tangent, level))
    return dual, levels | {level}


def _with_zeros(tensor: Tensor, levels: Levels) -> Tensor:
    """Return a tensor with tangents at all of these levels, zeros where it has none.

    Torch's sums have them. A zero is a use of the layer all the same, and counts where uses are
    counted one by one (factors that stand beside cross factors).
    """
    if not under_jvp():
        return tensor
    level = _functorch.peek_interpreter_stack().level()
    value, tangent = parts_below(tensor, level)
    top = _functorch.pop_dynamic_layer_stack()
    try:
        value = _with_zeros(value, levels)
        if tangent is None and level in levels:
            tangent = torch.zeros_like(value)
        if tangent is not None:
            tangent = _with_zeros(tangent, levels)
    finally:
        _functorch.push_dynamic_layer_stack(top)
    value = _functorch._wrap_for_grad(value, level)
    if tangent is None:
        return value
    dual: Tensor = forward_ad.make_dual(value, _functorch._wrap_for_grad(tangent, level))
    return dual


def parts_below(tensor: Tensor, level: int) -> tuple[Tensor, Tensor | None]:
    """Return a tensor and its tangent, as they are below a level of jvp."""
    value, tangent = forward_ad.unpack_dual(tensor)
    below = _functorch._unwrap_for_grad
    return below(value, level), None if tangent is None else below(tangent, level)
