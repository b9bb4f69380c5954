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
from kfac_fx.capture.layer_calls import has_parameters, translate
from kfac_fx.errors import CaptureError
from kfac_fx.torch_internals.higher_order import runs_nested_graph
from kfac_fx.torch_internals.parametrizations import is_untraceable, is_weight_norm

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent.parent)


class _BufferProxy(fx.proxy.ParameterProxy):
    """A buffer whose shape is known while tracing, as a parameter's is."""

    def __init__(self, tracer: fx.Tracer, node: fx.Node, buffer: torch.Tensor) -> None:
        fx.Proxy.__init__(self, node, tracer)
        self.param = buffer  # type: ignore[assignment]
        self.name = str(node.target)


class _Tracer(fx.Tracer):
    record_stack_traces = True

    def __init__(self) -> None:
        super().__init__(param_shapes_constant=True)
        self._buffers: dict[int, str] | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """A weight's parametrization is looked into, unless it tells modes and gradients apart."""
        if is_parametrized(m):
            found = m.parametrizations.modules()  # type: ignore[union-attr]
            return any(map(is_untraceable, found))
        if isinstance(m, ParametrizationList) or is_weight_norm(m):
            return False
        return super().is_leaf_module(m, module_qualified_name)

    def create_arg(self, a: Any) -> Any:
        """A dictionary that is a data class too (a model's named outputs) keeps its class."""
        named = is_dataclass(a) and isinstance(a, dict)
        if named:
            held = {f.name: self.create_arg(getattr(a, f.name)) for f in fields(a) if f.init}
            return self.create_node("call_function", type(a), (), held)
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Buffers as nodes too: an update of one would else run now and never again."""
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
    """The graph of ``model``.

    Args:
        given: arguments with a default that callers will pass; the others that default to None, a
            flag or a name are fixed at their default, since Python may branch on them.

    Raises:
        CaptureError: symbolic values cannot follow the code; names the user's line.
    """
    fixed: dict[str, Any] = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        default = parameter.default
        simple = default is None or isinstance(default, (bool, str))
        if simple and name not in given and parameter.kind not in (2, 4):
            fixed[name] = default
    try:
        return _Tracer().trace(model, concrete_args=fixed or None)
    except Exception as error:  # any code of the user's may run here
        raise CaptureError(f"{user_line(error)}: {error}") from error


def opaque_calls(model: nn.Module, graph: fx.Graph) -> list[str]:
    """Modules with parameters, and nested graphs that read some, that no rule can look into."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, None] = {}
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
    """Whether the node calls a Python function that was wrapped to stay whole."""
    target = node.target
    if not isinstance(target, types.FunctionType) or row_of(node.op, target) is not None:
        return False
    return not target.__module__.startswith("torch.")


def _is_parameter(model: nn.Module, node: fx.Node) -> bool:
    if node.op != "get_attr":
        return False
    owner, _, name = str(node.target).rpartition(".")
    module = dict(model.named_modules(remove_duplicate=False)).get(owner)
    return module is not None and name in module._parameters


def user_line(error: BaseException) -> str:
    """The last line of the user's own code on an error's traceback."""
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
