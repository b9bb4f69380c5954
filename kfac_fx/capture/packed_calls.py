"""The functions of torch that pack sequences of several lengths and pad them again, as one call.

Their Python asks for devices and lengths, which no symbolic value knows. Kept whole they need not
be followed: what they do depends on their arguments alone.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import fx, nn
from torch.nn.utils import rnn

from kfac_fx.torch_internals.pytree import tree_leaves

if TYPE_CHECKING:
    from kfac_fx.capture.recording import Recording

Value = Any
"""An argument or result of a function of torch's."""

PACKING = (rnn.pack_padded_sequence, rnn.pack_sequence)
"""Functions that return a PackedSequence."""

_REMADE = frozenset({"_replace", "to", "cuda", "cpu", "pin_memory", "double", "float", "half"})
"""Methods of a PackedSequence that return another one."""

WHOLE: tuple[Callable[..., Value], ...] = (*PACKING, rnn.pad_packed_sequence)
"""What a trace keeps as one call."""


@contextmanager
def kept_whole(tracer: Recording, root: nn.Module) -> Iterator[None]:
    """Within the context, a call of these functions on symbolic values is one node.

    fx wraps functions too, but only where the forward of a called module holds them, and not in a
    base class or a helper of another file.

    Args:
        tracer: makes the nodes.
        root: the model that is traced.
    """
    instead = {function: _whole(tracer, function) for function in WHOLE}
    before = list(_places(root))
    for scope, name, function in before:
        scope[name] = instead[function]
    try:
        yield
    finally:
        for scope, name, function in before:
            scope[name] = function


def _whole(tracer: Recording, function: Callable[..., Value]) -> Callable[..., Value]:
    """Return a function that makes one node of its call where it is given symbolic values."""

    def call(*args: Value, **kwargs: Value) -> Value:
        if any(issubclass(type(leaf), fx.Proxy) for leaf in tree_leaves((args, kwargs))):
            return tracer.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)

    return call


def _places(root: nn.Module) -> Iterator[tuple[dict[str, Value], str, Callable[..., Value]]]:
    """Yield where code finds the functions: the globals, the name in them, and the function."""
    # Under their own names everywhere; under any name in the files of the model's classes. All
    # globals of all files would be hundreds of thousands.
    names = {function.__name__ for function in WHOLE}
    scopes = {id(scope): (scope, names) for scope in map(_globals, list(sys.modules.values()))}
    classes = {base for module in root.modules() for base in type(module).__mro__}
    for kind in classes:
        scope = getattr(vars(kind).get("forward"), "__globals__", {})
        if not kind.__module__.startswith("torch."):
            scopes[id(scope)] = scope, set(scope)
    for scope, looked_at in scopes.values():
        for name in looked_at & scope.keys():
            for function in WHOLE:
                if scope[name] is function:
                    yield scope, name, function


def _globals(module: Value) -> dict[str, Value]:
    """Return the globals of an entry of sys.modules, where anything may be put."""
    found = getattr(module, "__dict__", None)
    return found if type(found) is dict else {}


def gives_packed(node: Value, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a node's value is a PackedSequence that the graph has made.

    An input of the graph is none: the guard lets the model itself run where it is one.

    Args:
        node: an argument of a call.
        modules: the model's submodules by path.
    """
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_method" and node.target in _REMADE:
        return gives_packed(node.args[0], modules)
    if node.op != "call_function":
        return False
    if node.target in PACKING:
        return True
    if node.target is not operator.getitem or node.args[1] != 0:
        return False
    # A recurrent layer returns its outputs as it was given its inputs.
    layer = node.args[0]
    assert isinstance(layer, fx.Node)
    if layer.op != "call_module" or not isinstance(modules.get(str(layer.target)), nn.RNNBase):
        return False
    given = [*layer.args, *layer.kwargs.values()]
    return gives_packed(layer.kwargs.get("input", given[0]), modules)
