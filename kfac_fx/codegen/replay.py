"""A function of tensors as the operators that it ran, to be run again without the Python around.

The graph is for the shapes that it was traced with, and it is run as it is: by torch, operator by
operator. There is no autograd in it, no hooks, and none of the code that the function was made of.
For small networks that is half of what a pass costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import getitem

import torch
from torch import Tensor, fx, nn

from kfac_fx.codegen.functional import (
    Argument,
    NotFunctionalError,
    functional_errors,
    is_random,
)
from kfac_fx.torch_internals.dispatch_modes import TorchDispatchMode
from kfac_fx.torch_internals.pytree import tree_leaves

_ATEN = torch.ops.aten

_ADD = _ATEN.add.Tensor
_MM = _ATEN.mm.default
_ZEROS = {_ATEN.zeros.default, _ATEN._efficientzerotensor.default}

MOST_ENTRIES = 2**24
"""Entries of all tensors of a trace. It keeps them until it is done, and operators on larger ones
take longer than all that a trace leaves out."""

_PLACE = "place"
"""Key in the meta of a node: how its tensor lies in memory; there for dense tensors."""

_RECURRENT: Argument = getattr(_ATEN, "mkldnn_rnn_layer", None)
_RECURRENT = _RECURRENT and _RECURRENT.default  # builds of torch without oneDNN lack it

_QUESTIONS = {_ATEN.is_same_size.default, _ATEN._has_same_storage_numel.default}
"""Operators that autograd asks of tangents while it is traced; nobody reads the answers."""

_HIDDEN: dict[object, tuple[int, ...]] = {
    _ATEN.native_batch_norm.default: (3, 4),
    _ATEN.cudnn_batch_norm.default: (3, 4),
}
"""Places of arguments that operators write into without saying so in their schema."""


def _recurrent_layer(*arguments: Argument) -> Argument:
    """Run oneDNN's recurrent layer with the workspace that its backward needs."""
    # It asks whether gradients are on, not whether it trains. A replay has them off, as autograd
    # has nothing to do in it: without this, the backward in the same graph finds no workspace.
    given = [each.detach() if isinstance(each, Tensor) else each for each in arguments]
    with torch.enable_grad():
        return _RECURRENT(*given)


def replayable(
    function: Callable[..., Sequence[Tensor]], arguments: Sequence[Tensor]
) -> fx.GraphModule:
    """Return the operators that a function runs, for arguments of the same shapes.

    What it writes into its arguments the graph writes as well, and random operators draw from
    torch's own stream, as they do in the function.

    Args:
        function: has no other inputs; it is run once.
        arguments: tensors of the shapes, dtypes and devices that the graph is for.

    Raises:
        NotFunctionalError: the code depends on the tensors' values, writes into an argument, or has
            tensors with more than ``MOST_ENTRIES`` in all.
    """
    # Copies: what a trace writes into must not be what it was given.
    copies = [argument.detach().clone() for argument in arguments]
    with functional_errors():
        recorder = _Recorder(copies)
        with recorder:
            results = function(*copies)
        return _tidied(recorder.finished(results))


class _Recorder(TorchDispatchMode):
    """Writes down every operator that runs, below autograd.

    make_fx does the same, for compilers: with a fake copy of every value, which takes fifty times
    as long. A pass that is run some hundred times has to earn the time that its trace took.

    Args:
        arguments: the tensors that become the arguments of the graph.
    """

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self._graph = fx.Graph()
        self._root = nn.Module()
        # By identity, which lasts as long as the tensor does: so all of them are kept.
        self._nodes: dict[int, fx.Node] = {}
        self._kept: list[Tensor] = []
        self._entries = 0
        for place, argument in enumerate(arguments):
            self._track(argument, self._graph.placeholder(f"argument_{place}"))

    def __torch_dispatch__(
        self, func: Argument, types: object, args: Argument = (), kwargs: Argument = None
    ) -> Argument:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in _QUESTIONS:
            given = self._named(list(args)), self._named(kwargs)
            self._note(result, self._graph.call_function(func, tuple(given[0]), given[1]))
        return result

    def finished(self, results: Sequence[Tensor]) -> fx.GraphModule:
        """Return the graph that returns these results."""
        self._graph.output([self._named(result) for result in results])
        return fx.GraphModule(self._root, self._graph)

    def _named(self, value: Argument) -> Argument:
        """Return the nodes in the place of tensors."""
        if isinstance(value, Tensor):
            return self._nodes.get(id(value)) or self._constant(value)
        if isinstance(value, (list, tuple)):
            return [self._named(part) for part in value]
        if isinstance(value, dict):
            return {name: self._named(part) for name, part in value.items()}
        return value

    def _constant(self, value: Tensor) -> fx.Node:
        name = f"constant_{len(self._kept)}"
        self._root.register_buffer(name, value)
        with self._graph.inserting_before(next(iter(self._graph.nodes))):
            node = self._graph.get_attr(name)
        self._track(value, node)
        return node

    def _note(self, result: Argument, node: fx.Node) -> None:
        if isinstance(result, Tensor):
            self._track(result, node)
        elif isinstance(result, (list, tuple)):
            for place, part in enumerate(result):
                if part is not None:
                    self._note(part, self._graph.call_function(getitem, (node, place)))
        elif result is not None:
            # A number that the code may go on with in any way: a branch, a shape, an exponent.
            raise NotFunctionalError(f"{node.target} looks at values")

    def _track(self, value: Tensor, node: fx.Node) -> None:
        self._nodes[id(value)] = node
        self._kept.append(value)
        self._entries += value.numel()
        if self._entries > MOST_ENTRIES:
            raise NotFunctionalError("its tensors are too large to gain by a trace")
        if value.layout is torch.strided:
            kind = value.dtype, value.is_conj(), value.is_neg()
            node.meta[_PLACE] = value.shape, value.stride(), value.storage_offset(), kind


def _tidied(module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph without what has no effect, in which no two results are one tensor."""
    graph = module.graph
    _drop_unused(graph)
    written = {place for node in graph.nodes for place in _written(node)}
    if any(_origin(node).op in ("placeholder", "get_attr") for node in written):
        raise NotFunctionalError("an argument is written into")
    # What is written into must be its own tensor, read by nobody but the node that writes: else two
    # names of one tensor are no reason to drop either.
    if all(_origin(node) is node and len(node.users) == 1 for node in written):
        _drop_aliases(graph)
        _drop_zeros(graph)
        _join_equal(graph, written)
        _drop_unused(graph)
    _separate_results(graph)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is _RECURRENT:
            node.target = _recurrent_layer
    graph.lint()
    return fx.GraphModule(module, graph)


def _drop_unused(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and not _acts(node):
            graph.erase_node(node)


def _written(node: fx.Node) -> list[fx.Node]:
    """Return the arguments of a node that it writes into."""
    if node.op != "call_function":
        return []
    schema = getattr(node.target, "_schema", None)
    places = _HIDDEN.get(node.target, ())
    given = [node.args[place] for place in places if place < len(node.args)]
    for place, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            at = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            given.append(at)
    return [leaf for leaf in tree_leaves(given) if isinstance(leaf, fx.Node)]


def _origin(node: fx.Node) -> fx.Node:
    """Return the node that made the memory of a tensor: views are followed back."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        schema = getattr(node.target, "_schema", None)
        shared = schema is None or any(result.alias_info is not None for result in schema.returns)
        if not shared:  # what has no schema takes a result out of several
            break
        node = node.args[0]
    return node


def _acts(node: fx.Node) -> bool:
    """Say whether a node does more than to return its result."""
    return bool(_written(node)) or is_random(node.target, node.args, node.kwargs)


def _drop_aliases(graph: fx.Graph) -> None:
    """Let nodes that see a tensor as one before them does be that one."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        source = node
        while _is_view(source):
            source = source.args[0]
            if _PLACE in source.meta and source.meta[_PLACE] == node.meta.get(_PLACE):
                node.replace_all_uses_with(source)
                graph.erase_node(node)
                break


def _is_view(node: fx.Node) -> bool:
    """Say whether a node returns its first argument's memory."""
    if node.target is _ATEN._unsafe_view.default:  # which says otherwise, for autograd
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None or _written(node) or not isinstance(node.args[0], fx.Node):
        return False
    return len(schema.returns) == 1 and schema.returns[0].alias_info is not None


def _drop_zeros(graph: fx.Graph) -> None:
    """Leave out products with zeros that are added to what has their shape: tangents of inputs."""
    zeros: set[fx.Node] = set()
    for node in list(graph.nodes):
        first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if node.target in _ZEROS or (first in zeros and (_is_view(node) or node.target is _MM)):
            zeros.add(node)
        if node.target is not _ADD or node.kwargs or len(node.args) != 2:
            continue
        # (a + 0) + b: the inner sum may be there to give a its shape, which b does as well.
        inner, b = node.args
        if not (isinstance(inner, fx.Node) and isinstance(b, fx.Node) and inner.target is _ADD):
            continue
        zero = len(inner.args) == 2 and not inner.kwargs and inner.args[1] in zeros
        shapes = [each.meta[_PLACE][0] for each in (b, node) if _PLACE in each.meta]
        if zero and len(shapes) == 2 and shapes[0] == shapes[1]:
            node.args = (inner.args[0], b)


def _join_equal(graph: fx.Graph, written: set[fx.Node]) -> None:
    """Let nodes that compute the same of the same be one: of several directions, their forward."""
    first: dict[object, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node in written or _acts(node):
            continue
        key = node.target, repr(node.args), repr(node.kwargs)  # names of nodes are unique
        known = first.setdefault(key, node)
        if known is not node:
            node.replace_all_uses_with(known)
            graph.erase_node(node)


def _separate_results(graph: fx.Graph) -> None:
    """Copy results that are arguments, or there twice: whoever gets them may write into them."""
    output = graph.output_node()
    seen: set[fx.Node] = set()
    results: list[fx.Node] = []
    with graph.inserting_before(output):
        for value in tree_leaves(output.args[0]):
            if value in seen or value.op in ("placeholder", "get_attr"):
                value = graph.call_function(_ATEN.clone.default, (value,))
            seen.add(value)
            results.append(value)
    output.args = (results,)
