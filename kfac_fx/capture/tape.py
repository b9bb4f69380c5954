"""Records the torch functions that a running model calls, one at a time, as an fx graph."""

from __future__ import annotations

import operator
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from kfac_fx.capture.dialect import row_of
from kfac_fx.capture.view import GraphView
from kfac_fx.ir import Tap


class Placement(NamedTuple):
    """A tap of a call that is about to run.

    Attributes:
        tap: says which tensor is tapped.
        record: from that tensor, and all tensors of the call by node, to the tensor in its place.
        parameters: whose use is recorded.
    """

    tap: Tap
    record: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    parameters: tuple[str, ...]


class Taps(Protocol):
    """Knows the taps of the calls that read parameters."""

    def place(self, view: GraphView, node: fx.Node) -> Sequence[Placement]:
        """Those of a call that is about to run."""

    def missed(self, names: set[str], node: fx.Node) -> None:
        """Notes parameters that a call uses and no tap records."""


_HERE = str(Path(__file__).parent.parent)
_VIEWS = ("T", "mT", "H", "mH")
_REFLECTED: dict[str, Any] = {
    "__radd__": operator.add,
    "__rsub__": operator.sub,
    "__rmul__": operator.mul,
    "__rdiv__": operator.truediv,
    "__rtruediv__": operator.truediv,
    "__rmatmul__": operator.matmul,
}


class Seen(torch.autograd.Function):
    """A parameter on its way into a recorded call: tells such uses from all others."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Tape(TorchFunctionMode):
    """Within the context, every call on tensors becomes a node of ``graph``.

    Parameters, buffers and other tensors that the model holds are ``get_attr`` nodes; tensors that
    come from elsewhere are placeholders, so they count as data.

    Args:
        model: the model that is about to run.
        taps: for the calls that read parameters; they record at once.
        mark: parameters pass through ``Seen``, and nodes get the user's line.

    Attributes:
        graph: grows as the model runs.
        view: reads it.
        touched: names of the parameters that any call has read.
    """

    def __init__(self, model: nn.Module, taps: Taps | None = None, *, mark: bool = False) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.view = GraphView(model, self.graph)
        self.touched: set[str] = set()
        self._taps = taps
        self._mark = mark
        self._parameters = {id(p): name for name, p in self.view.parameters.items()}
        self._constants = dict(_held_tensors(model))
        self._alive = [*self.view.parameters.values(), *self._constants.values()]
        self._names = {id(t): name for name, t in self._constants.items()} | self._parameters
        self._nodes: Any = WeakIdKeyDictionary()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = list(_tensors((args, kwargs)))
        if not any(self._reads_parameter(t) for t in tensors):
            return self._bind(func(*args, **kwargs), func, args, kwargs)
        if not torch.is_grad_enabled():
            return self._bind(func(*args, **kwargs), func, args, kwargs, detached=True)
        if _is_composed(func):
            with self:
                return _opened(func)(*args, **kwargs)
        return self._use(func, args, kwargs, tensors)

    def node(self, tensor: Tensor, *, detached: bool = False) -> fx.Node:
        """The node of a tensor; one that no call made is read from the model or is an input."""
        found: fx.Node | None = self._nodes.get(tensor)
        if found is None:
            name = self._names.get(id(tensor))
            found = self.placeholder("data") if name is None else self._new("get_attr", name)
            self._nodes[tensor] = found
        if id(tensor) in self._parameters:
            self.touched.add(self._parameters[id(tensor)])
        if detached and self.view.reference(found) is not None:
            return self._new("get_attr", "_detached")
        return found

    def placeholder(self, name: str) -> fx.Node:
        """A new input, in front of all other nodes."""
        with self.graph.inserting_before():
            return self._new("placeholder", name)

    def consume(self, name: str, by: Callable[..., Any]) -> None:
        """Notes a use of a parameter that no rule can look into."""
        self._new("call_function", by, (self._new("get_attr", name),))

    # A call.

    def _use(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        """Runs a call that reads parameters while gradients are on."""
        node = self._call(func, args, kwargs, detached=False)
        plans: Sequence[Placement] = ()
        if _is_recomputed():
            for name in self._names_read(node):
                self.consume(name, activation_checkpoint)
        elif self._taps is not None:
            plans = self._taps.place(self.view, node)
        values = {self.node(t).name: t for t in tensors}
        swap: dict[int, Tensor] = {}
        for tap, record, _ in plans:
            if tap.consumer is not None:
                swap[id(values[tap.node])] = record(values[tap.node], values)
        if self._mark and not _reads_property(func):
            swap |= {id(t): Seen.apply(t) for t in tensors if id(t) in self._parameters}
        if swap:
            args, kwargs = _mapped(lambda t: swap.get(id(t), t), (args, kwargs))
        result = func(*args, **kwargs)
        made = _made(func, args, result)
        if not any(t.requires_grad for t in made):
            self._replace_by_detached(node)
        if all(id(t) in self._names for t in made):
            self.graph.erase_node(node)
            return result
        self._report(node, plans)
        for tap, record, _ in plans:
            if tap.consumer is None and isinstance(result, Tensor) and result.requires_grad:
                result = record(result, values)
        self._results(made[0] if result is None else result, node)
        return result

    def _bind(
        self,
        result: Any,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        detached: bool = False,
    ) -> Any:
        """Adds the node of a call that has run and reads no parameter with gradients."""
        made = _made(func, args, result)
        if not all(id(t) in self._names for t in made):
            node = self._call(func, args, kwargs, detached=detached)
            self._results(made[0] if result is None else result, node)
        return result

    def _results(self, result: Any, node: fx.Node) -> None:
        if isinstance(result, Tensor):
            if id(result) not in self._names:
                self._nodes[result] = node
        elif isinstance(result, (tuple, list)):
            for index, item in enumerate(result):
                if isinstance(item, (Tensor, tuple, list)):
                    args = (node, index)
                    self._results(item, self._new("call_function", operator.getitem, args))

    def _report(self, node: fx.Node, plans: Sequence[Placement]) -> None:
        """A use that is no view of the parameter and is not recorded."""
        if self._taps is None or self.view.reference(node) is not None or self.view.is_split(node):
            return
        missed = self._names_read(node).difference(*(plan.parameters for plan in plans))
        if missed:
            self._taps.missed(missed, node)

    # Nodes.

    def _call(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, detached: bool
    ) -> fx.Node:
        op, target, args = _spelled(func, args)

        def argument(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self.node(value, detached=detached)
            return value if isinstance(value, _PLAIN) else repr(value)

        args, kwargs = _mapped(argument, (args, kwargs))
        return self._new(op, target, args, kwargs)

    def _new(self, op: str, target: Any, args: Any = (), kwargs: Any = None) -> fx.Node:
        node = self.graph.create_node(op, target, tuple(args), kwargs or {})
        self.view.read(node)
        if self._mark and self._names_read(node):
            node.meta["stack_trace"] = _user_stack()
        return node

    def _names_read(self, node: fx.Node) -> set[str]:
        found = map(self.view.reference, node.all_input_nodes)
        return {reference.name for reference in found if reference is not None}

    def _replace_by_detached(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if self.view.reference(source) is not None:
                with self.graph.inserting_before(node):
                    node.replace_input_with(source, self._new("get_attr", "_detached"))
        self.view.read(node)

    def _reads_parameter(self, tensor: Tensor) -> bool:
        if id(tensor) in self._parameters:
            return True
        node = self._nodes.get(tensor)
        return node is not None and self.view.reference(node) is not None


_NUMBERS: tuple[type, ...] = (int, float, complex, bool)
_SETTINGS: tuple[type, ...] = (torch.dtype, torch.device, torch.memory_format, torch.layout)
_PLAIN = (*_NUMBERS, *_SETTINGS, fx.Node, str, slice, type(None), type(Ellipsis))


def activation_checkpoint() -> None:
    """Stands in a recorded graph for uses that the backward pass computes again."""


def _is_recomputed() -> bool:
    """Whether the call runs within torch.utils.checkpoint, whose recomputation is not recorded."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def _held_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers, and the tensors in plain attributes, of all modules."""
    yield from model.named_buffers()
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            for index, leaf in enumerate(_tensors(value) if key[0] != "_" else ()):
                if not isinstance(leaf, nn.Parameter):
                    yield f"{path}.{key}.{index}".strip("."), leaf


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in nested tuples, lists and dicts; pytree takes ten times as long."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """The same nesting with changed leaves."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(change, item) for item in value))
    if isinstance(value, (tuple, list)):
        return (list if isinstance(value, list) else tuple)(_mapped(change, i) for i in value)
    if isinstance(value, dict):
        return {key: _mapped(change, item) for key, item in value.items()}
    return change(value)


def _made(func: Any, args: tuple[Any, ...], result: Any) -> list[Tensor]:
    """The tensors that a call returned, or the one that it wrote to."""
    if getattr(func, "__name__", "") == "__setitem__":
        result = args[0]
    return list(_tensors(result))


def _spelled(func: Any, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """Operation, target and arguments of the node that symbolic tracing would make."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return "call_function", getattr, (args[0], func.__self__.__name__)
    if name in _REFLECTED:
        return "call_function", _REFLECTED[name], (args[1], args[0])
    if getattr(Tensor, name, None) is func:
        return "call_method", name, args
    return "call_function", func, args


def _reads_property(func: Any) -> bool:
    return getattr(func, "__name__", "") == "__get__" and func.__self__.__name__ not in _VIEWS


def _is_composed(func: Any) -> bool:
    """Whether the function is written in Python and no word of the vocabulary."""
    return (
        isinstance(func, types.FunctionType)
        and func.__module__ == "torch.nn.functional"
        and row_of("call_function", func) is None
    )


def _opened(func: Any) -> Any:
    """The function without its question whether somebody overrides it: its body runs instead."""
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    scope = {**func.__globals__, **dict.fromkeys(names, lambda *_: False)}
    body = types.FunctionType(
        func.__code__, scope, func.__name__, func.__defaults__, func.__closure__
    )
    body.__kwdefaults__ = func.__kwdefaults__
    return body


def _user_stack() -> str:
    frames = traceback.extract_stack()
    return "".join(traceback.format_list([f for f in frames if not f.filename.startswith(_HERE)]))
