"""A graph as the rules see it: calls in one vocabulary, parameters behind views, data flow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from kfac_fx.capture.dialect import SHAPE_READERS, bind, row_of
from kfac_fx.capture.modules import Member, translate
from kfac_fx.ir import Layout


@dataclass(frozen=True)
class Call:
    """An operation of the vocabulary with its arguments by name."""

    operation: str
    node: fx.Node
    arguments: dict[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument, or the default where it was not given."""
        return self.arguments.get(name, default)


@dataclass(frozen=True)
class Reference:
    """A parameter seen through whole-tensor views."""

    name: str
    layout: Layout
    path: tuple[str, ...] = ()


@dataclass(frozen=True)
class Consumer:
    """A place where a parameter's path ends: the node, and the value that it reads there."""

    node: fx.Node
    value: fx.Node | None
    path: tuple[str, ...]


class GraphView:
    """Reads one graph of a module; nothing is changed."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module = module
        self.graph = graph
        self.parameters = dict(module.named_parameters())
        self._names = {id(p): name for name, p in self.parameters.items()}
        self._modules = dict(module.named_modules(remove_duplicate=False))
        self._references: dict[fx.Node, Reference | None] = {}
        self._calls: dict[fx.Node, Call | None] = {}
        self._data: set[fx.Node] = set()
        for node in graph.nodes:
            self._calls[node] = self._read_call(node)
            self._references[node] = self._read_reference(node)
            if self._carries_data(node):
                self._data.add(node)

    def call(self, node: fx.Node) -> Call | None:
        """The node in the common vocabulary, or None where it has no word for it."""
        return self._calls[node]

    def depends_on_data(self, value: Any) -> bool:
        """Whether the value of a node is computed from the model's inputs."""
        return isinstance(value, fx.Node) and value in self._data

    def tensor(self, member: Any) -> Tensor | None:
        """The tensor of the module that a member or ``get_attr`` node stands for."""
        path = member.path if isinstance(member, Member) else None
        if isinstance(member, fx.Node) and member.op == "get_attr":
            path = str(member.target)
        if path is None:
            return None
        owner, _, name = path.rpartition(".")
        value = getattr(self._modules.get(owner), name, None)
        return value if isinstance(value, Tensor) else None

    def reference(self, value: Any) -> Reference | None:
        """The parameter behind a node or module member, if there is exactly one seen whole."""
        if isinstance(value, fx.Node):
            return self._references[value]
        return self._parameter(value)

    def consumers(self, name: str) -> Iterator[Consumer]:
        """Where the paths of a parameter end, one for each node that is no view of it."""
        parameter = self.parameters[name]
        for node in self.graph.nodes:
            if node.op == "call_module":
                owned = self._modules[str(node.target)].parameters()
                if any(p is parameter for p in owned):
                    yield Consumer(node, None, (name,))
            reference = self._references[node]
            if reference is not None and reference.name == name:
                for user in node.users:
                    if self._references[user] is None and not _reads_shape(user):
                        yield Consumer(user, node, reference.path)

    def _parameter(self, value: Any) -> Reference | None:
        tensor = self.tensor(value)
        name = self._names.get(id(tensor)) if tensor is not None else None
        if tensor is None or name is None:
            return None
        return Reference(name, Layout(tuple(tensor.shape)), (name,))

    def _read_call(self, node: fx.Node) -> Call | None:
        if node.op == "call_module":
            path = str(node.target)
            module = self._modules.get(path)
            translated = None if module is None else translate(module, path)
            inputs = [*node.args, *node.kwargs.values()]
            if translated is None or len(inputs) != 1:
                return None
            return Call(translated.operation, node, {"input": inputs[0], **translated.arguments})
        row = row_of(node.op, node.target)
        if row is None:
            return None
        return Call(row.operation, node, bind(row, node.args, dict(node.kwargs)))

    def _read_reference(self, node: fx.Node) -> Reference | None:
        if node.op == "get_attr":
            return self._parameter(node)
        call = self._calls[node]
        if call is None or not isinstance(call.get("input"), fx.Node):
            return None
        source = self._references.get(call.get("input"))
        if source is None:
            return None
        layout = _seen_through(call, source.layout)
        if layout is None:
            return None
        return Reference(source.name, layout, (*source.path, call.operation))

    def _carries_data(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return True
        return not _reads_shape(node) and any(arg in self._data for arg in node.all_input_nodes)


def _reads_shape(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "device", "dtype", "is_cuda", "requires_grad")
    return node.op in ("call_function", "call_method") and node.target in SHAPE_READERS


def _seen_through(call: Call, layout: Layout) -> Layout | None:
    """The layout after a whole-tensor view, or None where the operation is none."""
    arguments = call.arguments
    dims = len(layout.shape)
    operation = call.operation
    if operation == "attribute":
        operation = {"T": "numpy_T", "mT": "mT"}.get(call.get("name"), "")
    try:
        if operation == "cast":
            return layout
        if operation == "t":
            return layout if dims < 2 else layout.transpose(0, 1)
        if operation == "numpy_T":
            return layout.permute(*reversed(range(dims)))
        if operation == "mT":
            return layout.transpose(-2, -1)
        if operation == "transpose":
            return layout.transpose(arguments["dim0"], arguments["dim1"])
        if operation == "permute":
            return layout.permute(*arguments["dims"])
        if operation == "reshape":
            return layout.reshape(arguments["shape"])
        if operation == "unsqueeze":
            shape = list(layout.shape)
            shape.insert(arguments["dim"] % (dims + 1), 1)
            return layout.reshape(shape)
        if operation == "squeeze":
            return _squeezed(layout, call.get("dim"))
        if operation == "flatten":
            start, end = call.get("start_dim", 0) % dims, call.get("end_dim", -1) % dims
            return layout.reshape((*layout.shape[:start], -1, *layout.shape[end + 1 :]))
    except (KeyError, TypeError, ValueError):
        return None  # sizes that are only known at run time
    return None


def _squeezed(layout: Layout, dim: int | None) -> Layout:
    shape = layout.shape
    axes = range(len(shape)) if dim is None else [dim % len(shape)]
    return layout.reshape([s for i, s in enumerate(shape) if i not in axes or s != 1])
