"""A graph as the rules see it: calls in one vocabulary, parameters seen through views, data flow.

The view tells two kinds of nodes apart. What depends on the model's inputs is data; what is
computed from parameters alone is a weight on its way to a use. A use is where the two meet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, fx, nn

from kfac_fx.capture.dialect import (
    PACKED_ROWS,
    SHAPE_READERS,
    Argument,
    Call,
    bind,
    operation_name,
    reads_shape_of,
    row_of_node,
)
from kfac_fx.capture.layer_calls import Member, translate
from kfac_fx.capture.mode_regions import GradMode
from kfac_fx.capture.packed_calls import gives_packed
from kfac_fx.capture.parameter_paths import (
    ComputedWeights,
    Reference,
    ancestors,
    seen_through,
    split_layouts,
)
from kfac_fx.capture.unnamed_views import unnamed_views
from kfac_fx.ir.layout import Layout


@dataclass(frozen=True)
class Consumer:
    """A place where a parameter's path ends.

    Attributes:
        node: what reads the parameter and is no view of it.
        value: the node that it reads there; None where a whole module is called.
        path: the parameter's name and the operations that it went through, for messages.
    """

    node: fx.Node
    value: fx.Node | None
    path: tuple[str, ...]


class GraphView:
    """Read one graph of a module; nothing is changed.

    Args:
        module: owns the parameters, submodules and buffers that the graph names.
        graph: is read at once; nodes that come later are read by ``read``.
        left_out: calls that are no uses of parameters, as no derivative comes back to them.

    Attributes:
        parameters: the module's parameters by their canonical names.
    """

    def __init__(
        self, module: nn.Module, graph: fx.Graph, left_out: Collection[fx.Node] = ()
    ) -> None:
        self.module = module
        self.graph = graph
        self._left_out = left_out
        self.parameters = dict(module.named_parameters())
        # A tensor is known by identity: tied weights are one parameter with several paths.
        self._names = {id(p): name for name, p in self.parameters.items()}
        self._modules = dict(module.named_modules(remove_duplicate=False))
        self._consumers: dict[str, list[Consumer]] | None = None
        self._references: dict[fx.Node, Reference | None] = {}
        self._pieces: dict[fx.Node, tuple[Reference, ...]] = {}
        self._calls: dict[fx.Node, Call | None] = {}
        self._data: set[fx.Node] = set()
        self._computed: set[fx.Node] = set()
        self._mapped: set[fx.Node] = set()
        self._undifferentiated: set[fx.Node] = set()
        self._grad_mode = GradMode()
        # It reads the tables above as they grow, and runs operations only when it is asked.
        self._computed_weights = ComputedWeights(
            module, self._calls, self._references, self._data, self._undifferentiated
        )
        for node in graph.nodes:
            self.read(node)

    def read(self, node: fx.Node) -> None:
        """Take in a node that is new or changed.

        Its inputs must have been read before, since a node's kind follows from theirs.
        """
        self._grad_mode.read(node)
        # Where the model has switched gradients off, a parameter is a constant like any other.
        if self._grad_mode.off and node.op not in ("get_attr", "placeholder", "output"):
            self._undifferentiated.add(node)
        self._calls[node] = self._read_call(node)
        self._references[node] = self._read_reference(node)
        self._consumers = None
        if self._carries_data(node):
            self._data.add(node)
        elif node in self._undifferentiated:
            pass
        elif self._references[node] or any(a in self._computed for a in node.all_input_nodes):
            self._computed.add(node)
        if _is_mapped(node, self._mapped):
            self._mapped.add(node)

    def is_mapped(self, node: fx.Node) -> bool:
        """Tell whether the node's value is inside torch.vmap, whose cases it does not show."""
        return node in self._mapped

    def is_undifferentiated(self, node: fx.Node) -> bool:
        """Tell whether a call is made with gradients switched off, or no derivative comes to it."""
        return node in self._undifferentiated or node in self._left_out

    def call(self, node: fx.Node) -> Call | None:
        """Return the node in the common vocabulary, None where that has no word for it."""
        return self._calls[node]

    def depends_on_data(self, value: Argument) -> bool:
        """Tell whether an argument is a node whose value is computed from the model's inputs."""
        return isinstance(value, fx.Node) and value in self._data

    def is_computed(self, node: fx.Node) -> bool:
        """Tell whether a value is that of a parameter, or computed from some and from no data."""
        return node in self._computed

    def is_per_case(self, value: Argument) -> bool:
        """Tell whether a value depends on the data, or is a copy for each case of what does not.

        A learned vector that is expanded over the batch does not depend on the data, but its
        derivatives come case by case all the same. Copies are known by an expansion to the first
        size of an input; so are new tensors (the zeros that a decoder begins with).
        """
        if not isinstance(value, fx.Node):
            return False
        return value in self._data or any(map(self._copies, ancestors(value)))

    def _copies(self, node: fx.Node) -> bool:
        name = operation_name(node) if node.op != "call_module" else ""
        if name.removeprefix("new_") in ("zeros", "ones", "full", "empty"):
            first: Argument = node.args[1 if name.startswith("new_") else 0] if node.args else None
            return self._counts_cases(first[0] if isinstance(first, (list, tuple)) else first)
        call = self._calls[node]
        if call is None or call.operation not in ("expand", "repeat"):
            return False
        sizes = call.get("shape")
        return bool(sizes) and self._counts_cases(sizes[0])

    def _counts_cases(self, size: Argument) -> bool:
        """Tell whether a size is a node that reads the first size of what depends on the data."""
        if not isinstance(size, fx.Node) or len(size.args) != 2 or size.args[1] != 0:
            return False
        # Either x.size(0), or getattr(x, "shape")[0], where x is one node further back.
        shape = size.args[0]
        if not isinstance(shape, fx.Node):
            return False
        return any(arg in self._data for arg in (shape, *shape.all_input_nodes))

    def tensor(self, member: Argument) -> Tensor | None:
        """Return the tensor of the module that a member or a ``get_attr`` node stands for."""
        path = member.path if isinstance(member, Member) else None
        if isinstance(member, fx.Node) and member.op == "get_attr":
            path = str(member.target)
        if path is None:
            return None
        owner, _, name = path.rpartition(".")
        value = getattr(self._modules.get(owner), name, None)
        return value if isinstance(value, Tensor) else None

    def reference(self, value: Argument) -> Reference | None:
        """Return the parameter, or its one piece, that a node or member shows through views."""
        if isinstance(value, fx.Node):
            return self._references[value]
        return self._parameter(value)

    def derived(self, value: Argument, names: Collection[str]) -> Reference | None:
        """Return the first of the named parameters that a value is computed from, by no data.

        Args:
            value: an argument of a call; what is no node has no parameter.
            names: the parameters to look for.
        """
        if not isinstance(value, fx.Node):
            return None
        return self._computed_weights.reference(value, frozenset(names))

    def ends(self, node: fx.Node) -> set[fx.Node]:
        """Return the nodes at which what is computed from a node meets the data or goes out."""
        found: set[fx.Node] = set()
        seen = {node}
        todo = [node]
        while todo:
            here = todo.pop()
            if here in self._data or not here.users:
                found.add(here)
                continue
            new = set(here.users) - seen
            seen |= new
            todo += new
        return found

    def is_split(self, node: fx.Node) -> bool:
        """Tell whether the node cuts a parameter into pieces."""
        return node in self._pieces

    def consumers(self, name: str) -> tuple[Consumer, ...]:
        """Return the places where the paths of a parameter end: its readers that are no views."""
        if self._consumers is None:
            self._consumers = {}
            for owner, consumer in self._all_consumers():
                self._consumers.setdefault(owner, []).append(consumer)
        return tuple(self._consumers.get(name, ()))

    def _all_consumers(self) -> Iterator[tuple[str, Consumer]]:
        for node in self.graph.nodes:
            # A module that is called whole reads all its parameters, whatever its code does.
            if node.op == "call_module" and not self.is_undifferentiated(node):
                for parameter in self._modules[str(node.target)].parameters():
                    name = self._names[id(parameter)]
                    yield name, Consumer(node, None, (name,))
            reference = self._references[node]
            for user in node.users if reference is not None else ():
                assert reference is not None
                # A view is followed further; what only reads the shape takes no value at all.
                viewed = self._references[user] is not None or user in self._pieces
                if self.is_undifferentiated(user) or _switches(user):
                    continue
                if not viewed and not _reads_shape(user) and not reads_shape_of(user, node):
                    yield reference.name, Consumer(user, node, reference.path)

    def _parameter(self, value: Argument) -> Reference | None:
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
            if translated is None:
                return None
            inputs = _inputs(translated.inputs, node)
            if inputs is None:
                return None
            operation = translated.operation
            if isinstance(module, nn.RNNBase) and gives_packed(inputs["input"], self._modules):
                operation = PACKED_ROWS[operation].operation
            return Call(operation, node, inputs | translated.arguments)
        row = row_of_node(node)
        if row is None:
            return None
        return Call(row.operation, node, bind(row, node.args, dict(node.kwargs)))

    def _read_reference(self, node: fx.Node) -> Reference | None:
        if node.op == "get_attr":
            return self._parameter(node)
        if node in self._undifferentiated:
            return None
        call = self._calls[node]
        if call is None:
            return self._read_unnamed(node)
        viewed = call.get("input")
        if isinstance(viewed, (int, float)):
            viewed = call.get("other")  # c + p
        # A split makes a tuple, which is no tensor: its pieces become references where they are
        # taken out of it.
        if not isinstance(viewed, fx.Node):
            return self._read_unnamed(node)  # its input has another name: einsum("ij->ji", p)
        pieces = self._pieces.get(viewed)
        if pieces is not None:
            index = call.get("index")
            return pieces[index] if isinstance(index, int) else None
        source = self._references.get(viewed)
        if source is None:
            return None
        path = (*source.path, call.operation)
        layouts = split_layouts(call, source.layout)
        if layouts is not None:
            self._pieces[node] = tuple(Reference(source.name, piece, path) for piece in layouts)
            return None
        layout = seen_through(call, source.layout)
        if layout is None:
            return self._read_unnamed(node)
        return Reference(source.name, layout, path)

    def _read_unnamed(self, node: fx.Node) -> Reference | None:
        """Return what a view shows that no table knows, by its name or with its arguments."""
        source = next((self._references.get(given) for given in node.all_input_nodes), None)
        found = None if source is None else unnamed_views(node, source.layout)
        if source is None or found is None:
            return None
        path = (*source.path, operation_name(node))
        shown = tuple(Reference(source.name, layout, path) for layout in found.layouts)
        if found.several:
            self._pieces[node] = shown
            return None
        return shown[0]

    def _carries_data(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return True
        return not _reads_shape(node) and any(arg in self._data for arg in node.all_input_nodes)


def _inputs(names: tuple[str, ...], node: fx.Node) -> dict[str, Argument] | None:
    """Return what a module is called with, by our names, None where the call does not fit.

    A single input may have any name in the module's own ``forward``.
    """
    inputs: dict[str, Argument] = dict(zip(names, node.args, strict=False))
    for index, (key, value) in enumerate(node.kwargs.items(), start=len(node.args)):
        positional = names[min(index, len(names) - 1)]
        inputs[key if key in names else positional] = value
    return inputs if inputs and len(inputs) == len(node.args) + len(node.kwargs) else None


def _is_mapped(node: fx.Node, mapped: set[fx.Node]) -> bool:
    """Tell whether a node is inside torch.vmap, which enters and leaves by functions of its own."""
    name = getattr(node.target, "__name__", "")
    if name == "_remove_batch_dim":
        return False
    return name == "_add_batch_dim" or any(given in mapped for given in node.all_input_nodes)


def _switches(node: fx.Node) -> bool:
    """Tell whether a node only says whether a tensor is trained, as a forward that freezes does."""
    return node.target == "requires_grad_" and not node.users


def _reads_shape(node: fx.Node) -> bool:
    """Tell whether a node takes a shape, type or device from a tensor and none of its values."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "device", "dtype", "is_cuda", "requires_grad")
    return node.op in ("call_function", "call_method") and node.target in SHAPE_READERS
