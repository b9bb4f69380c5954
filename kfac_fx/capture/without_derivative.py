"""Find the calls of a graph that no derivative of its outputs comes back to."""

from __future__ import annotations

from torch import fx

from kfac_fx.capture.dialect import operation_name
from kfac_fx.capture.in_place import writes
from kfac_fx.capture.mode_regions import GradMode

_STOPS = frozenset(
    {"argmax", "argmin", "argsort", "bincount", "bool", "detach", "eq", "ge", "gt", "int"}
    | {"isfinite", "isinf", "isnan", "item", "le", "long", "lt", "logical_and", "logical_not"}
    | {"logical_or", "multinomial", "ne", "nonzero", "one_hot", "searchsorted", "tolist"}
)
"""Operations whose results have no derivative, whatever they are given."""


def without_derivative(graph: fx.Graph) -> frozenset[fx.Node]:
    """Return the calls whose results reach the outputs through what has no derivative alone.

    A teacher's branch that ends in ``detach()`` is one, or a norm that is a constant in
    ``v / v.norm().detach()``. What nothing uses at all is none: it may stand for what is not shown.

    Args:
        graph: is read and not changed.
    """
    mode = GradMode()
    stops: set[fx.Node] = set()
    for node in graph.nodes:
        mode.read(node)
        if mode.off or _is_stop(node):
            stops.add(node)
    reached: set[fx.Node] = set()
    # What is written in place may be read by way of another node.
    todo = [n for n in graph.nodes if not n.users or (writes(n) and n not in stops)]
    while todo:
        node = todo.pop()
        if node not in reached:
            reached.add(node)
            todo += [] if node in stops else node.all_input_nodes
    kinds = ("call_function", "call_method", "call_module")
    return frozenset(n for n in graph.nodes if n.op in kinds and n not in reached)


def _is_stop(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] == "data"
    return node.op in ("call_function", "call_method") and operation_name(node) in _STOPS
