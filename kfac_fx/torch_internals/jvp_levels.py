"""Run code on the plain tensors below torch.func.jvp, once for the value and once for each tangent.

Why: an autograd function that is called under jvp goes through torch's interpreters in Python, one
after another, each of which inspects it anew and calls it for its tangents; at every layer that was
most of the time of a pass with statistics. No public way: torch.func gives no tensors out of a
function that it transforms. Seen on torch 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch = torch._C._functorch


class _Left(threading.local):
    """How many transforms this thread has left and will come back to."""

    levels = 0


_left = _Left()

Use = Callable[[Tensor, Sequence[Tensor | None], int], Tensor]
"""(y, tensors, order) -> y, where order is how many tangents were taken of the value."""


def below_jvp(use: Use, y: Tensor, tensors: Sequence[Tensor | None], order: int = 0) -> Tensor:
    """Return ``use(y, tensors, 0)``, where uses of tangents are calls of their own.

    Args:
        use: returns its first argument, with nodes of autograd at it. It is called below the jvp of
            torch.func that are on top of the stack; what else is there it may be called inside of.
        y: has tangents, where jvp has reached it.
        tensors: further ones; where they have no tangent and y has, theirs is zero.
        order: of y itself.
    """
    level = innermost_jvp()
    if level is None:
        return use(y, tensors, order)
    value, tangent = parts_below(y, level)
    parts = [(None, None) if t is None else parts_below(t, level) for t in tensors]
    with without_top_layer():
        value = below_jvp(use, value, [v for v, _ in parts], order)
        if tangent is not None:
            others = [torch.zeros_like(v) if v is not None and t is None else t for v, t in parts]
            tangent = below_jvp(use, tangent, others, order + 1)
    return of_parts(value, tangent, level)


def innermost_jvp() -> int | None:
    """Return the level of the innermost transform that is on, if it is torch.func.jvp."""
    layer = _functorch.peek_interpreter_stack()
    if layer is None or layer.key() != _functorch.TransformType.Jvp:
        return None
    level: int = layer.level()
    return level


def parts_below(tensor: Tensor, level: int) -> tuple[Tensor, Tensor | None]:
    """Return a tensor and its tangent, as they are below a level of jvp."""
    value, tangent = forward_ad.unpack_dual(tensor)
    below = _functorch._unwrap_for_grad
    return below(value, level), None if tangent is None else below(tangent, level)


def of_parts(value: Tensor, tangent: Tensor | None, level: int) -> Tensor:
    """Return the tensor of a level of which these are the parts below it."""
    wrapped: Tensor = _functorch._wrap_for_grad(value, level)
    if tangent is None:
        return wrapped
    dual: Tensor = forward_ad.make_dual(wrapped, _functorch._wrap_for_grad(tangent, level))
    return dual


@contextmanager
def without_top_layer() -> Iterator[None]:
    """Leave the innermost transform for as long as the context lasts."""
    layer = _functorch.pop_dynamic_layer_stack()
    _left.levels += 1
    try:
        yield
    finally:
        _left.levels -= 1
        _functorch.push_dynamic_layer_stack(layer)


def on_plain_tensors() -> bool:
    """Say whether no transform of torch.func is on, or code runs below all that are."""
    return _functorch.peek_interpreter_stack() is None


def below_a_jvp() -> bool:
    """Say whether code runs on the plain tensors below a level of jvp."""
    return _left.levels > 0
