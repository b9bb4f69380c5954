"""Calls as torch.overrides reports them: their tensors, and the nodes that they would be."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from kfac_fx.capture.dialect import row_of

_VIEWS = ("T", "mT", "H", "mH")
_REFLECTED: dict[str, Any] = {
    "__radd__": operator.add,
    "__rsub__": operator.sub,
    "__rmul__": operator.mul,
    "__rdiv__": operator.truediv,
    "__rtruediv__": operator.truediv,
    "__rmatmul__": operator.matmul,
}


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Those in nested tuples, lists and dicts; pytree takes ten times as long."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """The same nesting with changed leaves."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(change, item) for item in value))
    if isinstance(value, (tuple, list)):
        return (list if isinstance(value, list) else tuple)(mapped(change, i) for i in value)
    if isinstance(value, dict):
        return {key: mapped(change, item) for key, item in value.items()}
    return change(value)


def made_by(func: Any, args: tuple[Any, ...], result: Any) -> list[Tensor]:
    """The tensors that a call returned, or the one that it wrote to."""
    if getattr(func, "__name__", "") == "__setitem__":
        result = args[0]
    return list(tensors_of(result))


def spelled(func: Any, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """Operation, target and arguments of the node that symbolic tracing would make."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return "call_function", getattr, (args[0], func.__self__.__name__)
    if name in _REFLECTED:
        return "call_function", _REFLECTED[name], (args[1], args[0])
    if getattr(Tensor, name, None) is func:
        return "call_method", name, args
    return "call_function", func, args


def reads_property(func: Any) -> bool:
    return getattr(func, "__name__", "") == "__get__" and func.__self__.__name__ not in _VIEWS


def is_composed(func: Any) -> bool:
    """Whether the function is written in Python and no word of the vocabulary."""
    return (
        isinstance(func, types.FunctionType)
        and func.__module__ == "torch.nn.functional"
        and row_of("call_function", func) is None
    )


def opened(func: Any) -> Any:
    """The function without its question whether somebody overrides it: its body runs instead."""
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    scope = {**func.__globals__, **dict.fromkeys(names, lambda *_: False)}
    body = types.FunctionType(
        func.__code__, scope, func.__name__, func.__defaults__, func.__closure__
    )
    body.__kwdefaults__ = func.__kwdefaults__
    return body
