"""Follow the dimension that counts the cases from the inputs of a graph to its uses.

Statistics take the first dimension for the cases. Models transpose ([positions, cases, features])
and fold positions into rows; a norm's covariance, the mean over positions and EKFAC's moments would
then be those of positions.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import fx, nn

from kfac_fx.capture.dialect import Argument
from kfac_fx.capture.graph_view import GraphView
from kfac_fx.ir.use import CaseView, NodeRef, ParameterUse, Tap
from kfac_fx.passes.rules.base import joined


class Cases(NamedTuple):
    """Where the cases of a node's value are.

    Attributes:
        dim: the dimension that counts them, from the left.
        merged: the value before it was reshaped to rows, each of one position of a case; its first
            dimension counts the cases. None where ``dim`` counts nothing else.
    """

    dim: int
    merged: fx.Node | None = None


_TURNED = frozenset({"linear", "scale_shift", "shift"})
"""Taps whose features are the last dimensions, so that the first ones can change places."""

TRANSPOSED = "its features are the cases of a transposed batch: its rows count as cases"

_SWAPS = frozenset({"transpose", "swapaxes", "swapdims"})
_TURNS = frozenset({"permute", "movedim", "moveaxis", "T", "mT", "t"})
_MOVES = _SWAPS | _TURNS
_REDUCTIONS = frozenset(
    {"mean", "sum", "amax", "amin", "max", "min", "prod", "std", "var", "norm", "logsumexp"}
    | {"argmax", "argmin", "any", "all", "median", "select"}
)
_ROWS = frozenset({"reshape", "view", "flatten", "_unsafe_view"})
_KEPT = frozenset(
    {"narrow", "slice", "split", "chunk", "split_with_sizes", "unbind", "expand", "index_select"}
)
_PADDING = frozenset({"pad_packed_sequence", "_pad_packed_sequence"})


def place_cases(
    module: nn.Module, graph: fx.Graph, uses: Iterable[ParameterUse]
) -> list[ParameterUse]:
    """Return the uses with taps that see the cases first.

    Args:
        module: owns what the graph reads.
        graph: without taps.
        uses: those that were found in it.
    """
    uses = list(uses)
    several: dict[tuple[str, ...], int] = {}
    for use in uses:
        several[use.parameters] = several.get(use.parameters, 0) + 1
    turned = any(use.tap is not None and use.tap.operator in _TURNED for use in uses)
    # Most graphs keep the cases first, and need not be read once more.
    if not turned or (max(several.values()) == 1 and not _may_move(graph)):
        return uses
    found = find_cases(GraphView(module, graph))
    nodes = {node.name: node for node in graph.nodes}
    return [_placed(use, nodes, found, several[use.parameters] > 1) for use in uses]


def _may_move(graph: fx.Graph) -> bool:
    """Tell whether any call of a graph, or its caller, may put another dimension first."""
    symbol = _symbol_of_cases(graph)
    for node in graph.nodes:
        if _name(node) in _MOVES | _PADDING:
            return True
        shape = _shape(node) if node.op == "placeholder" and symbol else ()
        if shape and str(shape[0]) != symbol:
            return True
    return False


def _placed(
    use: ParameterUse, nodes: Mapping[str, fx.Node], found: Mapping[fx.Node, Cases], several: bool
) -> ParameterUse:
    """Return a use with the view that its tap needs.

    Args:
        use: a use.
        nodes: the nodes of the graph by name.
        found: where the cases of nodes are.
        several: whether others share its factors: then rows of all uses must count alike, though
            some see positions as a dimension and others see them folded into the cases.
    """
    tap = use.tap
    if tap is None or tap.operator not in _TURNED or tap.consumer is not None or tap.scale:
        return use
    if tap.operator == "linear" and not _features_last(tap):
        return use
    cases = found.get(nodes[tap.node])
    if cases is None:
        return use
    read = [nodes[t.name] for t in tap.tensors if isinstance(t, NodeRef) and t.name in nodes]
    # Of a transposed batch, x.t(), the layer's features are the cases: those cannot come first. Its
    # rows count as cases then, as they do where nobody knows where the cases are.
    if cases.dim and tap.operator == "linear" and any(map(_transposed, read)):
        return replace(use, reason=joined(use.reason, TRANSPOSED))
    if cases.dim and all(found.get(node) == cases for node in read):
        return replace(use, tap=replace(tap, cases=CaseView(cases.dim)))
    folded = cases.merged if several and tap.operator == "linear" else None
    if folded is not None and not cases.dim:
        return replace(use, tap=replace(tap, cases=CaseView(0, NodeRef(folded.name))))
    return use


def _transposed(node: fx.Node) -> bool:
    """Tell whether a node whose cases do not come first is a matrix, so that they come last."""
    return _name(node) in ("t", "T") or len(_shape(node)) == 2


def _features_last(tap: Tap) -> bool:
    """Tell whether a linear tap's features are the last dimensions of what it reads and stands on.

    Those of ``W @ x.T`` are not. Its cases come after them, and are the first of the dimensions
    that are left: a view with the cases first would give the features another number.
    """
    places = tap.options[:2]  # of the features of the inputs, and of the outputs; from the right
    return all(
        isinstance(dims, tuple) and set(dims) == set(range(-len(dims), 0)) for dims in places
    )


def find_cases(view: GraphView) -> dict[fx.Node, Cases]:
    """Return where the cases are, for the nodes for which it can be told.

    Where a graph knows its sizes by symbols, the cases are what the first dimension of the outputs
    counts. Otherwise they are the first dimension of the inputs, and are followed from call to
    call.

    Args:
        view: reads the graph.
    """
    followed = _followed(view)
    symbol = _symbol_of_cases(view.graph)
    if symbol is None:
        return followed
    found: dict[fx.Node, Cases] = {}
    for node in view.graph.nodes:
        shape = _shape(node)
        places = [dim for dim, size in enumerate(shape) if str(size) == symbol]
        if len(places) == 1:
            found[node] = Cases(places[0])
        elif node in followed and followed[node].merged is not None:
            found[node] = followed[node]
    return found


def _shape(node: fx.Node) -> Sequence[object]:
    value = node.meta.get("val")
    return value.shape if isinstance(value, torch.Tensor) else ()


def _symbol_of_cases(graph: fx.Graph) -> str | None:
    """Return the open size that every output with dimensions has first, None without one."""
    outputs = [n for n in graph.output_node().all_input_nodes if _shape(n)]
    first = {
        str(_shape(node)[0]) if isinstance(_shape(node)[0], torch.SymInt) else None
        for node in outputs
    }
    symbol = first.pop() if len(first) == 1 else None
    # A product of sizes is none that could be found again.
    return symbol if symbol is not None and symbol.isalnum() else None


def _followed(view: GraphView) -> dict[fx.Node, Cases]:
    """Return where the cases are if they are the first dimension of every input."""
    found: dict[fx.Node, Cases] = {}
    for node in view.graph.nodes:
        _follow(view, node, found)
    return found


def _follow(view: GraphView, node: fx.Node, found: dict[fx.Node, Cases]) -> None:
    """Note where the cases of one node are, if it can be told.

    Args:
        view: reads the graph.
        node: comes after the nodes that it reads.
        found: where the cases of those are; gets this one's.
    """
    if node.op == "placeholder":
        found[node] = Cases(0)
        return
    data = [n for n in node.all_input_nodes if view.depends_on_data(n) and n in found]
    if not view.depends_on_data(node) or not data:
        return
    cases = _after(node, data, found)
    if cases is not None:
        found[node] = cases


class GrowingCases:
    """Where the cases are in the graph of a model that runs, which grows call by call.

    Args:
        view: reads the graph.
    """

    def __init__(self, view: GraphView) -> None:
        self._view = view
        self._found: dict[fx.Node, Cases] = {}
        self._last: fx.Node | None = None

    def placed(self, use: ParameterUse, node: fx.Node) -> ParameterUse:
        """Return a use at the newest call with the view that its tap needs.

        Args:
            use: found in the call.
            node: the call.
        """
        graph = self._view.graph
        here = next(iter(graph.nodes)) if self._last is None else self._last.next
        # New inputs are put in front of all other nodes.
        for source in graph.nodes:
            if source.op != "placeholder" or source in self._found:
                break
            self._found[source] = Cases(0)
        while here.op != "root":
            _follow(self._view, here, self._found)
            self._last, here = here, here.next
        nodes = {one.name: one for one in (node, *node.all_input_nodes)}
        return _placed(use, nodes, self._found, several=False)


def _after(node: fx.Node, data: Sequence[fx.Node], found: Mapping[fx.Node, Cases]) -> Cases | None:
    """Return where the cases of a call's value are, None where it cannot be told.

    Args:
        node: the call.
        data: the nodes that it reads and whose cases are known.
        found: where those are.
    """
    first = found[data[0]]
    name = _name(node)
    arguments = node.args[1:]
    if node.op == "call_module":
        return first
    if name in _SWAPS:
        return _swapped(first, arguments)
    if name in _TURNS:
        return _permuted(first, name, arguments)
    if name in _PADDING:
        return Cases(0)  # of the tuple that it returns
    if name in ("getitem", "__getitem__") and _name(data[0]) in _PADDING:
        return Cases(_padded_cases(data[0]))
    if name in ("getitem", "__getitem__"):
        return _indexed(first, node.args[1])
    if name in _ROWS:
        rows = (
            name == "flatten"
            and arguments[:1] not in ((), (0,))
            and "start_dim" not in str(node.kwargs)
        )
        if first.dim:
            return None
        return first if rows or first.merged else Cases(0, data[0])
    if name in _REDUCTIONS:
        return _reduced(first, node)
    if name in ("unsqueeze", "stack"):
        dim = arguments[0] if arguments else node.kwargs.get("dim", 0)
        moved = isinstance(dim, int) and 0 <= dim <= first.dim
        return first._replace(dim=first.dim + 1) if moved else first
    if name in _KEPT or len({found[n].dim for n in data}) == 1:
        merged = next((found[n] for n in data if found[n].merged), first)
        return merged
    return None


def _name(node: fx.Node) -> str:
    """Return the name of what a node calls, of an operator without its overload."""
    if node.target is getattr and len(node.args) > 1:
        return str(node.args[1])
    if node.target is operator.getitem:
        return "getitem"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return str(name).split(".")[0]


def _numbers(arguments: Sequence[Argument]) -> list[int] | None:
    """Return dimensions that are given one by one or as a sequence, None for what is computed."""
    if len(arguments) == 1 and isinstance(arguments[0], (list, tuple)):
        arguments = tuple(arguments[0])
    numbers = [a for a in arguments if isinstance(a, int) and not isinstance(a, bool)]
    return numbers if len(numbers) == len(arguments) else None


def _swapped(cases: Cases, arguments: Sequence[Argument]) -> Cases | None:
    dims = _numbers(arguments)
    if dims is None or len(dims) != 2:
        return None
    if min(dims) < 0:
        # From the right: without the number of dimensions, only the first one is surely no part.
        return cases if max(dims) < 0 and not cases.dim else None
    if cases.dim not in dims:
        return cases
    moved = dims[1] if cases.dim == dims[0] else dims[0]
    return None if cases.merged else Cases(moved)


def _permuted(cases: Cases, name: str, arguments: Sequence[Argument]) -> Cases | None:
    if name in ("T", "t"):
        return Cases(1 - cases.dim) if cases.dim < 2 and not cases.merged else None
    if name == "mT":
        return cases if not cases.dim else None
    dims = _numbers(arguments)
    if dims is None or name != "permute" or cases.merged:
        return None
    dims = [dim % len(dims) for dim in dims]
    return Cases(dims.index(cases.dim)) if cases.dim in dims else None


def _padded_cases(node: fx.Node) -> int:
    """Return where the cases are in what a call pads: it says so, however they came to it."""
    place = 1 if _name(node) == "pad_packed_sequence" else 2
    given = node.args[place] if len(node.args) > place else node.kwargs.get("batch_first", False)
    return 0 if given else 1


def _indexed(cases: Cases, index: Argument) -> Cases | None:
    """Return where the cases are after ``x[index]``; an entry of a tuple has those of its owner."""
    entries = index if isinstance(index, tuple) else (index,)
    if len(entries) == 1 and isinstance(entries[0], int) and not cases.dim:
        return cases  # of a tuple, as no case is taken out of a batch by its number
    dim = 0
    moved = 0
    for entry in entries:
        if entry is Ellipsis:
            return Cases(moved + cases.dim - dim, cases.merged) if dim <= cases.dim else None
        if entry is None:
            moved += 1
            continue
        if dim == cases.dim:
            return cases._replace(dim=moved) if isinstance(entry, slice) else None
        dim += 1
        moved += not isinstance(entry, int)
    return cases._replace(dim=moved + cases.dim - dim)


def _reduced(cases: Cases, node: fx.Node) -> Cases | None:
    given = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    dims = _numbers((given,)) if isinstance(given, int) else _numbers((given or (),))
    if not dims or cases.dim in dims:
        return None
    keeps = node.kwargs.get("keepdim", len(node.args) > 2 and node.args[2] is True)
    if keeps:
        return cases
    return cases._replace(dim=cases.dim - sum(0 <= dim < cases.dim for dim in dims))
