"""Read calls as torch.overrides reports them: their tensors, and the nodes that they would be."""

from __future__ import annotations

import operator
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from kfac_fx.capture.dialect import row_of
from kfac_fx.torch_internals.onlookers import inside_transform, packed_by_checkpoint

Value = Any
"""An argument or result of the user's: a tensor, a number, or any nesting of those."""

Function = Any
"""A torch function: of Python or C++, a method, or the getter of a property."""

_VIEWS = ("T", "mT", "H", "mH")
_REFLECTED: dict[str, Callable[..., Value]] = {
    "__radd__": operator.add,
    "__rsub__": operator.sub,
    "__rmul__": operator.mul,
    "__rdiv__": operator.truediv,
    "__rtruediv__": operator.truediv,
    "__rmatmul__": operator.matmul,
}


def tensors_of(value: Value) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts; pytree takes ten times as long."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)


def renormed(
    func: Function, args: tuple[Value, ...], kwargs: dict[str, Value]
) -> tuple[tuple[Value, ...], dict[str, Value]]:
    """Shorten the rows that a lookup with ``max_norm`` reads, and return its other arguments.

    The lookup would write to the weight itself; an alias of it in autograd's graph forbids that.

    Args:
        func: a torch function; others than lookups are left alone.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """
    if func not in (F.embedding, F.embedding_bag):
        return args, kwargs
    third = "padding_idx" if func is F.embedding else "offsets"
    names = ("input", "weight", third, "max_norm", "norm_type")
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    limit = named.get("max_norm")
    if limit is None:
        return args, kwargs
    with torch.no_grad():
        rows = named["input"].contiguous()
        torch.embedding_renorm_(named["weight"].detach(), rows, limit, named.get("norm_type", 2.0))
    others = {key: value for key, value in kwargs.items() if key not in names}
    return (*map(named.get, names[:3]), None, 2.0, *args[len(names) :]), others


def mapped(change: Callable[[Value], Value], value: Value, *, plain: bool = False) -> Value:
    """Return the same nesting of tuples, lists and dicts with changed leaves.

    Args:
        change: from a leaf to what takes its place.
        value: a leaf or a nesting of them.
        plain: return named tuples as tuples; fx makes them anew by a ``__new__`` of their class,
            which may take other arguments.
    """
    if isinstance(value, tuple) and hasattr(value, "_fields") and not plain:
        return tuple.__new__(type(value), [mapped(change, item) for item in value])
    if isinstance(value, (tuple, list)):
        items = (mapped(change, item, plain=plain) for item in value)
        return list(items) if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: mapped(change, item, plain=plain) for key, item in value.items()}
    return change(value)


def made_by(func: Function, args: tuple[Value, ...], result: Value) -> list[Tensor]:
    """Return the tensors that a call returned, or the one that it wrote to."""
    if result is None and args:
        result = args[0]  # __setitem__, and the functions that write to lists of tensors
    return list(tensors_of(result))


def spelled(func: Function, args: tuple[Value, ...]) -> tuple[str, Function, tuple[Value, ...]]:
    """Return operation, target and arguments of the node that symbolic tracing would make."""
    # ``x.T`` arrives as the getter of a property, ``2 @ x`` as x's reflected method, ``x.mul(y)``
    # as the method of the class. The vocabulary knows them as fx spells them.
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return "call_function", getattr, (args[0], func.__self__.__name__)
    if name in _REFLECTED:
        return "call_function", _REFLECTED[name], (args[1], args[0])
    if getattr(Tensor, name, None) is func:
        return "call_method", name, args
    return "call_function", func, args


def is_in_place(target: Function) -> bool:
    """Tell whether a call writes to its first tensor, by torch's convention for names."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def reads_property(func: Function) -> bool:
    """Tell whether a call reads a property that is no view, such as ``shape`` or ``grad``.

    One that freezes its tensor, or lets it train again, is none that computes with it either.
    """
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return func.__self__.__name__ not in _VIEWS
    return name == "requires_grad_"


def is_composed(func: Function) -> bool:
    """Tell whether the function is written in Python and no word of the vocabulary."""
    return (
        isinstance(func, types.FunctionType)
        and func.__module__ == "torch.nn.functional"
        and row_of("call_function", func) is None
    )


def activation_checkpoint() -> None:
    """Stand in a recorded graph for uses that the backward pass computes again."""


def function_transform() -> None:
    """Stand in a recorded graph for uses inside torch.vmap and its like, which hide the cases."""


def hidden_by() -> Callable[[], None] | None:
    """Return why a tap would not see what a call does, as the function that stands for the call.

    A checkpointed call runs twice, and what its first run records belongs to no backward pass; in
    torch.vmap one tensor stands for all cases. None for all other calls.
    """
    if inside_transform():
        return function_transform
    return activation_checkpoint if packed_by_checkpoint() else None


def in_reentrant_checkpoint() -> bool:
    """Tell whether the call is in a checkpoint whose backward runs it again with gradients.

    Such a checkpoint switches gradients off and leaves no other sign than its frame.
    """
    forward = CheckpointFunction.forward.__code__
    return any(frame.f_code is forward for frame, _ in traceback.walk_stack(None))
