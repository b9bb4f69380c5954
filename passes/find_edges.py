"""Find the dependencies between blocks: one walk over the graph, from use to use.

An edge says that the output of one layer reaches the input of another without a layer between that
would end the path. Couplings are chosen among the edges, and their weights say which come first.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import fx

from kfac_fx.capture.dialect import PACKED_ROWS, Target
from kfac_fx.capture.graph_view import GraphView
from kfac_fx.capture.packed_calls import WHOLE
from kfac_fx.ir.coupling import Edge
from kfac_fx.ir.curvature_graph import CurvatureBlock

# Words that show in the picture and decide on the kind of an edge.
_FLATTENING = frozenset({"flatten", "reshape", "view"})
_MIXING = frozenset({"scaled_dot_product_attention", "softmax", "matmul", "bmm", "einsum"})
_AVERAGING = frozenset({"mean", "sum", "amax"})
_REGROUPING = frozenset(
    {function.__name__ for function in WHOLE} | {row.operation for row in PACKED_ROWS.values()}
)
_INTERNAL = frozenset({"getitem", "contiguous", "to", "cast", "alias", "dropout", "identity"})

SOURCES = 32
"""Largest number of blocks that are followed to a node, the nearest ones.

A residual stream comes from all layers before it, so without a limit the edges of a deep network
would be all pairs of its layers.
"""


class _Reach(NamedTuple):
    """The way on which a node is reached from a block.

    Attributes:
        distance: operations passed on the way.
        via: the node before it on the way; None for the block's own node.
    """

    distance: int
    via: fx.Node | None


class _Found(NamedTuple):
    """An edge before it is described.

    Attributes:
        source: name of the block that it begins at.
        target: name of the block that it ends at.
        distance: operations passed on the way.
        nodes: those on its way, in order.
    """

    source: str
    target: str
    distance: int
    nodes: tuple[fx.Node, ...]


def find_edges(
    view: GraphView,
    blocks: Mapping[str, CurvatureBlock],
    layers: Collection[str],
    ends: Collection[str],
    shuffled: Collection[fx.Node] = (),
) -> tuple[Edge, ...]:
    """Return the edges from the uses of ``layers`` to those that follow them.

    Args:
        view: reads the graph.
        blocks: all blocks, in the order of the forward pass.
        layers: names of blocks that have edges; paths go through all others (norms, scales).
        ends: those at which a path ends; it goes on through other layers too.
        shuffled: calls after which a row is of another case than the same row before.
    """
    places: dict[str, list[str]] = {}
    for name in (name for name in blocks if name in layers):
        for use in blocks[name].uses:
            places.setdefault(use.node, []).append(name)
    reach: dict[fx.Node, dict[str, _Reach]] = {}
    found: list[_Found] = []
    # One walk in the graph's order: when a node is met, all that it reads has been reached, so the
    # cost is that of the nodes times the blocks followed to each.
    for node in view.graph.nodes:
        # What is recorded on one side has no partner in the same row of the other.
        before = {} if node in shuffled else _incoming(view, node, reach)
        here = places.get(node.name, [])
        found += [
            _Found(source, name, step.distance, _nodes_between(source, step, reach))
            for name in here
            for source, step in before.items()
            if source not in here
        ]
        # A layer that can be coupled ends all paths: what follows depends on earlier layers through
        # it. Others (a norm, a bias of its own) are gone through.
        if here:
            before = {} if set(here) <= set(ends) else before
            before = before | dict.fromkeys(here, _Reach(0, None))
        if before:
            reach[node] = before
    return _edges(view, found, list(blocks), ends)


def _incoming(
    view: GraphView, node: fx.Node, reach: Mapping[fx.Node, dict[str, _Reach]]
) -> dict[str, _Reach]:
    """Return the nearest way from each block whose output the node reads."""
    found: dict[str, _Reach] = {}
    if not view.depends_on_data(node) or view.is_undifferentiated(node):
        return found
    # The rows of a packed batch are steps in the order of time, and before and after it there are
    # cases: what is recorded on one side has no partner in the same row of the other.
    if _label(view, node) in _REGROUPING:
        return found
    for index, source in enumerate(node.all_input_nodes):
        # Of attention's arguments the values are nearest: the result is linear in them.
        cost = 3 if index < 2 and _label(view, node) == "scaled_dot_product_attention" else 1
        for name, step in reach.get(source, {}).items():
            if name not in found or step.distance + cost < found[name].distance:
                found[name] = _Reach(step.distance + cost, source)
    if len(found) <= SOURCES:
        return found
    nearest = sorted(found.items(), key=lambda item: item[1].distance)
    return dict(nearest[:SOURCES])


def _nodes_between(
    source: str, step: _Reach, reach: Mapping[fx.Node, dict[str, _Reach]]
) -> tuple[fx.Node, ...]:
    """Return the nodes on the nearest way from a block to where ``step`` ends."""
    nodes: list[fx.Node] = []
    while step.via is not None:
        following = reach[step.via][source]
        if following.via is not None:
            nodes.append(step.via)
        step = following
    return tuple(reversed(nodes))


def _edges(
    view: GraphView, found: list[_Found], order: list[str], ends: Collection[str]
) -> tuple[Edge, ...]:
    """Return edges with their descriptions.

    A weight falls with the number of blocks that the edge skips, then with the operations on its
    way: the chain from layer to layer is preferred to skips, and of two equal skips the shorter.

    Args:
        view: reads the graph.
        found: is sorted in place by target and source, in the order of the forward pass.
        order: names of all blocks, in that order.
        ends: names of those at which a path ends.
    """
    place = {name: index for index, name in enumerate(order)}
    found.sort(key=lambda edge: (place[edge.target], place[edge.source]))
    depth = dict.fromkeys(order, 0)
    fan = dict.fromkeys(order, 0)
    for edge in found:
        fan[edge.source] += 1
        if edge.source in ends:
            depth[edge.target] = max(depth[edge.target], depth[edge.source] + 1)
    passed = dict.fromkeys(node for edge in found for node in edge.nodes)
    labels = {node: _label(view, node) for node in passed}
    joins = {node for node in passed if sum(map(view.depends_on_data, node.all_input_nodes)) > 1}
    edges = []
    for source, target, distance, nodes in found:
        gap = max(depth[target] - depth[source], 1)
        path = tuple(labels[node] for node in nodes)
        several = {labels[node] for node in nodes if node in joins}
        kinds = _kinds(several, path, fork=fan[source] > 1, skip=gap > 1)
        shown = tuple(label for label in path if label not in _INTERNAL)
        # The gap decides, for it is the number of layers skipped; the distance only breaks ties.
        weight = 1 / gap - 1e-3 * distance / (distance + 50)
        edges.append(Edge(source, target, shown, kinds, weight))
    return tuple(edges)


def _kinds(several: set[str], path: tuple[str, ...], *, fork: bool, skip: bool) -> tuple[str, ...]:
    """Return the kinds of an edge, for the picture and for couplings between what is joined.

    Args:
        several: operations on its way that join several values.
        path: all operations on its way.
        fork: whether its source has other targets too.
        skip: whether it goes past a block.
    """
    answers = {
        "fork": fork,
        "join": bool(several - _MIXING),
        "skip": skip,
        "pooling": any("pool" in label or label in _AVERAGING for label in path),
        "flatten": bool(_FLATTENING & set(path)),
        "sequence mixing": bool(several & _MIXING),
    }
    return tuple(kind for kind, holds in answers.items() if holds)


def _label(view: GraphView, node: fx.Node) -> str:
    """Return what a node does, in one word."""
    call = view.call(node)
    if call is not None and call.operation != "attribute":
        return call.operation
    target: Target = node.target
    if node.op == "call_module":
        target = type(view.module.get_submodule(str(target))).__name__
        # DropPath becomes drop_path, as functions are spelled.
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", target).lower()
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return name.split(".")[0].strip("_")
