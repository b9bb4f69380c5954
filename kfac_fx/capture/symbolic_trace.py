"""Capture by torch.fx.symbolic_trace: no inputs needed, torch.nn modules stay whole."""

from __future__ import annotations

import inspect
import linecache
import traceback
import types
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from kfac_fx.capture.dialect import row_of
from kfac_fx.capture.input_forms import fixed_arguments
from kfac_fx.capture.layer_calls import has_parameters, translate
from kfac_fx.errors import CaptureError
from kfac_fx.torch_internals.operators import runs_nested_graph
from kfac_fx.torch_internals.parametrizations import is_untraceable, is_weight_norm

Value = Any
"""What fx hands to a tracer's hooks: a proxy, a tensor, or any argument of the user's."""

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent.parent)


class _BufferProxy(fx.proxy.ParameterProxy):
    """A buffer whose shape is known while tracing, as a parameter's is.

    Python code branches on ``self.table.shape``; a plain proxy's shape is symbolic and would stop
    the trace there.
    """

    def __init__(self, tracer: fx.Tracer, node: fx.Node, buffer: torch.Tensor) -> None:
        fx.Proxy.__init__(self, node, tracer)
        self.param = buffer  # type: ignore[assignment]
        self.name = str(node.target)


class _Tracer(fx.Tracer):
    """fx's tracer with parametrizations, named outputs and buffers followed."""

    record_stack_traces = True

    def __init__(self) -> None:
        # Code that branches on the shape of a weight takes its branch while it is traced.
        super().__init__(param_shapes_constant=True)
        self._buffers: dict[int, str] | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Look into a weight's parametrization, unless it tells modes and gradients apart."""
        # fx would keep a parametrized nn.Linear whole, as it is a class of torch.nn; its weight is
        # then computed out of sight. Some parametrizations cannot be traced and stay whole.
        if is_parametrized(m):
            found = m.parametrizations.modules()  # type: ignore[union-attr]
            return any(map(is_untraceable, found))
        if isinstance(m, ParametrizationList) or is_weight_norm(m):
            return False
        return super().is_leaf_module(m, module_qualified_name)

    def create_arg(self, a: Value) -> Value:
        """Keep the class of a dictionary that is a data class too (a model's named outputs)."""
        named = is_dataclass(a) and isinstance(a, dict)
        if named:
            held = {f.name: self.create_arg(getattr(a, f.name)) for f in fields(a) if f.init}
            return self.create_node("call_function", type(a), (), held)
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Value, parameter_proxy_cache: dict[str, Value]) -> Value:
        """Make a buffer a node too: an update of one would else run now and never again."""
        # fx makes nodes of parameters only. The names are collected at the first buffer, for most
        # models have none.
        if isinstance(attr_val, torch.Tensor) and not isinstance(attr_val, nn.Parameter):
            if self._buffers is None:
                self._buffers = {id(b): name for name, b in self.root.named_buffers()}
            name = self._buffers.get(id(attr_val))
            if name is not None:
                if name not in parameter_proxy_cache:
                    node = self.create_node("get_attr", name, (), {})
                    parameter_proxy_cache[name] = _BufferProxy(self, node, attr_val)
                return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def trace(model: nn.Module, given: Collection[str] = ()) -> fx.Graph:
    """Return the graph of ``model`` in its present mode.

    Args:
        model: its ``forward`` is run once, on symbolic values.
        given: arguments with a default that callers will pass; the others that default to None, a
            flag or a name are fixed at their default, since Python may branch on them.

    Raises:
        CaptureError: symbolic values cannot follow the code; names the user's line.
    """
    fixed = fixed_arguments(inspect.signature(model.forward), given)
    try:
        return _Tracer().trace(model, concrete_args=fixed or None)
    except Exception as error:  # any code of the user's may run here
        raise CaptureError(f"{user_line(error)}: {error}") from error


def opaque_calls(model: nn.Module, graph: fx.Graph) -> list[str]:
    """Return names of what reads parameters and no rule can look into.

    These are modules that the trace kept whole, nested graphs, and functions that were wrapped.

    Args:
        model: the captured model.
        graph: its capture.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, None] = {}
    # The order is that of the graph, and a module that is called twice is named once.
    for node in graph.nodes:
        path = str(node.target)
        if node.op == "call_module" and path in modules:
            if has_parameters(modules[path]) and translate(modules[path], path) is None:
                found[path] = None
        elif (runs_nested_graph(node.target) or _is_foreign(node)) and any(
            _is_parameter(model, argument) for argument in node.all_input_nodes
        ):
            found[node.name] = None
    return list(found)


def _is_foreign(node: fx.Node) -> bool:
    """Tell whether the node calls a Python function that was wrapped to stay whole."""
    target = node.target
    if not isinstance(target, types.FunctionType) or row_of(node.op, target) is not None:
        return False
    return not target.__module__.startswith("torch.")


def _is_parameter(model: nn.Module, node: fx.Node) -> bool:
    """Tell whether the node reads a parameter of the model."""
    if node.op != "get_attr":
        return False
    owner, _, name = str(node.target).rpartition(".")
    module = dict(model.named_modules(remove_duplicate=False)).get(owner)
    return module is not None and name in module._parameters


def user_line(error: BaseException) -> str:
    """Return the last line of the user's own code on an error's traceback, with file and number."""
    # What torch and this library do in between is of no use to who reads the message.
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_TORCH, _HERE, "<"))
    ]
    if not frames:
        return "in torch"
    frame = frames[-1]
    line = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
    return f"{frame.filename}:{frame.lineno}: `{line}`"
