"""Follow the dimension that counts the cases from the inputs of a graph to its uses.

Statistics take the first dimension for the cases. Models transpose ([positions, cases, features])
and fold positions into rows; a norm's covariance, the mean over positions and EKFAC's moments would
then be those of positions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from kfac_fx.capture.graph_view import GraphView
from kfac_fx.ir.use import CaseView, NodeRef, ParameterUse, Tap
from kfac_fx.ops.case_first import POSITIONS_FIRST, WITHIN
from kfac_fx.passes.case_order import MIXERS, Cases, mixed_later, name_of, shape_of
from kfac_fx.passes.follow_cases import MOVING, ONE_SOURCE, cases_after
from kfac_fx.passes.rules.base import joined

_TURNED = frozenset({"linear", "scale_shift", "shift"})
"""Taps whose features are the last dimensions, so that the first ones can change places."""

_BROADCAST = frozenset({"cases", "case_rows"})
"""Taps of a parameter that is broadcast over the cases of the other operand."""

TRANSPOSED = "its features are the cases of a transposed batch: its rows count as cases"

MIXED = "its cases are mixed after it: a row's derivative counts for the row's own case"

UNKNOWN = "where its cases are cannot be told: its rows count as cases"


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
    kinds = _TURNED | _BROADCAST
    turned = any(use.tap is not None and use.tap.operator in kinds for use in uses)
    # Most graphs keep the cases first, and need not be read once more.
    if not turned or (max(several.values()) == 1 and not _may_move(graph)):
        return uses
    found = find_cases(GraphView(module, graph))
    nodes = {node.name: node for node in graph.nodes}
    placed = [_placed(use, nodes, found, several[use.parameters] > 1) for use in uses]
    before = mixed_later(graph, found)
    return [_named_mixed(use, nodes, before) for use in placed] if before else placed


def _named_mixed(
    use: ParameterUse, nodes: Mapping[str, fx.Node], before: Collection[fx.Node]
) -> ParameterUse:
    """Return a use with the reason where its cases are mixed after it and its factors count them.

    Args:
        use: a use.
        nodes: the nodes of the graph by name.
        before: those whose cases are mixed later.
    """
    tap = use.tap
    if tap is None or nodes[use.node] not in before or not _sees_cases(tap):
        return use
    return replace(use, reason=joined(use.reason, MIXED))


def _sees_cases(tap: Tap) -> bool:
    """Tell whether the statistics of a tap depend on which rows are one case."""
    return tap.operator in _BROADCAST or (
        tap.operator in _TURNED | {"folded_scale_shift"} and _counts_cases(tap)
    )


def _may_move(graph: fx.Graph) -> bool:
    """Tell whether any call of a graph, or its caller, may put another dimension first."""
    symbol = _symbol_of_cases(graph)
    for node in graph.nodes:
        if name_of(node) in MOVING or name_of(node) in MIXERS or node.op == "call_module":
            return True
        shape = shape_of(node) if node.op == "placeholder" and symbol else ()
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
    if tap is not None and tap.operator in _BROADCAST:
        return _placed_broadcast(use, tap, nodes, found)
    if tap is None or tap.operator not in _TURNED or tap.consumer is not None or tap.scale:
        return use
    if tap.operator == "linear" and not _features_last(tap):
        return use
    cases = found.get(nodes[tap.node])
    # The others are running moments of a norm, which have no cases.
    read = [nodes[t.name] for t in tap.tensors[:1] if isinstance(t, NodeRef)]
    if cases is None or any(found.get(node) is None for node in read):
        return _unplaced(use, tap)
    # Of a transposed batch, x.t(), the layer's features are the cases: those cannot come first. Its
    # rows count as cases then, as they do where nobody knows where the cases are.
    if cases.dim and tap.operator == "linear" and any(map(_transposed, read)):
        return replace(use, reason=joined(use.reason, TRANSPOSED))
    if cases.dim:
        if cases.dim in _channels(tap) or any(found.get(node) != cases for node in read):
            return _unplaced(use, tap)
        turned = _groups_turned(tap, cases.dim, [*map(shape_of, (*read, nodes[tap.node]))])
        if turned is None:
            return _unplaced(use, tap)
        return replace(use, tap=replace(turned, cases=CaseView(cases.dim)))
    if cases.merged is None or not (several or _counts_cases(tap)):
        return use
    folds = _folds(nodes[tap.node], cases)
    if folds is False:
        return use
    place = _folded_back(tap)
    if cases.inner:
        place = None if place else POSITIONS_FIRST
    if place is not None:
        return replace(use, tap=replace(tap, cases=CaseView(place, NodeRef(cases.merged.name))))
    if _looks_at_whole_cases(tap) and not cases.inner:
        view = CaseView(WITHIN, NodeRef(cases.merged.name))
        return replace(use, tap=replace(tap, operator="folded_scale_shift", cases=view))
    return _unplaced(use, tap) if folds else use


def _placed_broadcast(
    use: ParameterUse, tap: Tap, nodes: Mapping[str, fx.Node], found: Mapping[fx.Node, Cases]
) -> ParameterUse:
    """Return a use of a parameter that is broadcast over the cases, with the view that it needs."""
    like = tap.tensors[0]
    if not isinstance(like, NodeRef):
        return use  # the model has made a copy for each case
    other = nodes[like.name]
    cases = found.get(other)
    folded = cases is not None and _folds(other, cases) is not False
    if cases is None or (folded and cases.inner):
        return _unplaced(use, tap)
    if folded and cases.merged is not None:
        return replace(use, tap=replace(tap, cases=CaseView(0, NodeRef(cases.merged.name))))
    return replace(use, tap=replace(tap, cases=CaseView(cases.dim))) if cases.dim else use


def _folds(rows: fx.Node, cases: Cases) -> bool | None:
    """Tell whether the cases are folded with positions, None where nothing says it."""
    if cases.merged is None:
        return False
    sizes = shape_of(rows), shape_of(cases.merged)
    return str(sizes[0][0]) != str(sizes[1][0]) if all(sizes) else cases.folded or None


def _unplaced(use: ParameterUse, tap: Tap) -> ParameterUse:
    """Return a use whose rows count as cases, with the reason where that changes its factors."""
    return replace(use, reason=joined(use.reason, UNKNOWN)) if _counts_cases(tap) else use


def _counts_cases(tap: Tap) -> bool:
    """Tell whether a tap sums over a case's positions before it forms products.

    Rows of a dense use that are not reduced enter its factors alike, whoever's they are.
    """
    return tap.operator != "linear" or tap.options[5] is True


def _channels(tap: Tap) -> tuple[int, ...]:
    """Return the dimensions of a norm's or a bias's channels; those of dense uses are the last."""
    if tap.operator == "linear":
        return ()
    channels = tap.options[2 if tap.operator == "scale_shift" else 0]
    return tuple(d for d in channels if isinstance(d, int)) if isinstance(channels, tuple) else ()


def _folded_back(tap: Tap) -> int | None:
    """Return where the positions go that are taken out of the first dimension, as in ``CaseView``.

    Those of one position after another can only go behind the cases.

    None where the tap normalises all dimensions of a case, so that there is no place for them.
    """
    channels = _channels(tap)
    if _looks_at_whole_cases(tap):
        return None
    if all(dim < 0 for dim in channels):
        return 0
    return None if min(channels) < 1 else -1


def _looks_at_whole_cases(tap: Tap) -> bool:
    """Tell whether a tap is that of a norm whose moments are of all dimensions but the first."""
    return tap.operator == "scale_shift" and tap.options[0] in ("group", "instance")


def _transposed(node: fx.Node) -> bool:
    """Tell whether a node whose cases do not come first is a matrix, so that they come last."""
    return name_of(node) in ("t", "T") or len(shape_of(node)) == 2


def _groups_turned(tap: Tap, cases: int, shapes: Sequence[Sequence[object]]) -> Tap | None:
    """Return a tap whose groups are where they stand once its cases come first.

    Groups count from the right, and those before the cases ([experts, cases, features]) are one
    place further on then. Where no sizes are known, a tap with groups is left as it is (None): it
    puts the groups aside before it reads rows.

    Args:
        tap: of a use.
        cases: the dimension of its cases.
        shapes: of what it reads, and of what it stands on; empty where they are not known.
    """
    if tap.operator != "linear" or not any(tap.options[2:4]):
        return tap
    if not all(shapes) or len(shapes) != 2:
        return None
    options = list(tap.options)
    for place, shape in zip((2, 3), shapes, strict=True):
        dims = options[place]
        assert isinstance(dims, tuple)
        given = [dim for dim in dims if isinstance(dim, int)]
        options[place] = tuple([d + 1 if len(shape) + d < cases else d for d in given])
    return replace(tap, options=tuple(options))


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
    symbol = _symbol_of_cases(view.graph)
    found: dict[fx.Node, Cases] = {}
    for node in view.graph.nodes:
        _follow(view, node, found)
        shape = () if symbol is None else shape_of(node)
        places = [dim for dim, size in enumerate(shape) if str(size) == symbol]
        if len(places) == 1:
            found[node] = Cases(places[0])
        elif symbol and shape and node in found and not _counted_by(found[node], symbol):
            del found[node]
    return found


def _counted_by(cases: Cases, symbol: str) -> bool:
    """Tell whether what was folded has the open size where the cases are taken to be."""
    sizes = () if cases.merged is None else shape_of(cases.merged)
    return len(sizes) > cases.inner and str(sizes[cases.inner]) == symbol


def _symbol_of_cases(graph: fx.Graph) -> str | None:
    """Return the open size that every output with dimensions has first, None without one."""
    outputs = [n for n in graph.output_node().all_input_nodes if shape_of(n)]
    first = {
        str(shape_of(node)[0]) if isinstance(shape_of(node)[0], torch.SymInt) else None
        for node in outputs
    }
    symbol = first.pop() if len(first) == 1 else None
    # A product of sizes is none that could be found again.
    return symbol if symbol is not None and symbol.isalnum() else None


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
    source = node.args[0] if node.args and name_of(node) in ONE_SOURCE else None
    if isinstance(source, fx.Node) and view.depends_on_data(source) and source not in found:
        return
    cases = cases_after(node, data, found, view.module)
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
        self._nodes: dict[str, fx.Node] = {}
        self._first_uses: dict[tuple[str, int], tuple[Tensor, list[int]]] = {}

    def first_use(
        self, form: tuple[str, int], x: Tensor, others: list[int]
    ) -> tuple[Tensor, list[int]]:
        """Return what the first use of a block's form has read, and which dimensions are no cases.

        Args:
            form: name of the block, and number of the form.
            x: what this use reads, with the cases first.
            others: its dimensions that count neither cases nor positions.
        """
        # Only sizes are read of it, so its memory need not stay.
        found = self._first_uses.get(form)
        if found is None:
            found = torch.empty(x.shape, device="meta"), others
            self._first_uses[form] = found
        return found

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
            self._nodes[source.name] = source
        while here.op != "root":
            _follow(self._view, here, self._found)
            self._nodes[here.name] = here
            self._last, here = here, here.next
        nodes = {one.name: one for one in (node, *node.all_input_nodes)}
        return _placed(use, nodes, self._found, several=False)

    def count(self, view: CaseView) -> int | None:
        """Return the number of cases where they are folded with positions, None elsewhere."""
        sizes = () if view.like is None else shape_of(self._nodes[view.like.name])
        place = int(view.dim == POSITIONS_FIRST)
        size = sizes[place] if len(sizes) > place else None
        return size if isinstance(size, int) else None
