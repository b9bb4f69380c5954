"""Weights that are computed from a parameter before they meet the data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from kfac_fx.capture.views import seen_through
from kfac_fx.ir import Layout

if TYPE_CHECKING:
    from kfac_fx.capture.view import GraphView


@dataclass(frozen=True)
class Derivation:
    """A tensor that is computed from a parameter, in a view of its shape, and from no data.

    Attributes:
        source: the node of the parameter, or of a view of it, that all ways begin at.
        seen: from the parameter's shape to the source's.
        result: the node of the computed tensor, in the source's shape.
        start: the source's value, in double precision.
        function: from a value of the source to the result; all else as it is now.
    """

    source: fx.Node
    seen: Layout
    result: fx.Node
    start: Tensor
    function: Callable[[Tensor], Tensor]


def derivations(
    view: GraphView, value: Any, names: Collection[str]
) -> Iterator[tuple[str, Layout, Derivation]]:
    """The named parameters that ``value``, or what it is a view of, is computed from.

    Yields:
        The name, the layout from the parameter's shape to the value's, and the derivation.
    """
    if not isinstance(value, fx.Node) or view.depends_on_data(value):
        return
    nodes = ancestors(value)
    held = [(node, view.reference(node)) for node in nodes]
    sources = [(n, r) for n, r in held if r is not None and r.name in names and r.layout.whole]
    values = _evaluate(view, nodes, {}) if sources else None
    for source, reference in sources if values is not None else ():
        assert values is not None and reference is not None
        chain = _back_to(view, value, values, source)
        if chain is None or not _gate(view, source, reference.name, chain[-1]):
            continue
        layout = reference.layout
        for node in reversed(chain[:-1]):
            call = view.call(node)
            viewed = None if call is None else seen_through(call, layout)
            assert viewed is not None
            layout = viewed
        function = _function(view, source, chain[-1])
        start = values[source].detach()
        found = Derivation(source, reference.layout, chain[-1], start, function)
        yield reference.name, layout, found


def ancestors(value: fx.Node, stop: fx.Node | None = None) -> list[fx.Node]:
    """``value`` and all that it is computed from, in the graph's order, not looking behind stop."""
    found, todo = {value}, [value]
    while todo:
        here = todo.pop()
        new = set() if here is stop else set(here.all_input_nodes) - found
        found |= new
        todo += new
    return sorted(found)


def _gate(view: GraphView, source: fx.Node, name: str, result: fx.Node) -> bool:
    """Whether every way from the parameter to the result goes through the source."""
    roots = [n for n in ancestors(result, source) if n.op == "get_attr" and n is not source]
    references = [view.reference(root) for root in roots]
    return all(reference is None or reference.name != name for reference in references)


def _back_to(
    view: GraphView, value: fx.Node, values: dict[fx.Node, Any], source: fx.Node
) -> list[fx.Node] | None:
    """The views from ``value`` back to a tensor of the source's shape, which ends the list."""
    chain = [value]
    while chain[-1] is not source:
        here = values[chain[-1]]
        if not isinstance(here, Tensor) or not here.is_floating_point():
            return None
        if here.shape == values[source].shape:
            return chain
        call = view.call(chain[-1])
        before = None if call is None else values.get(call.get("input"))
        if call is None or not isinstance(before, Tensor):
            return None
        if seen_through(call, Layout(tuple(before.shape))) is None:
            return None
        chain.append(call.get("input"))
    return None


def _evaluate(
    view: GraphView, nodes: list[fx.Node], given: dict[fx.Node, Tensor]
) -> dict[fx.Node, Any] | None:
    """Values of the nodes in double precision, or None where they cannot be computed apart."""
    values: dict[fx.Node, Any] = {}
    try:
        with torch.random.fork_rng([]), torch.enable_grad():
            for node in nodes:
                values[node] = given[node] if node in given else _run(view, node, values)
    except Exception:  # any code of the user's may run here
        return None
    return values


def _run(view: GraphView, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        held = attrgetter(str(node.target))(view.module)
        if not isinstance(held, Tensor):
            return held  # a graph that a higher-order operator runs
        held = held.detach().clone()  # what updates itself updates the copy
        return held.double() if held.is_floating_point() else held
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    raise ValueError(f"{node.op} is not run apart")


def _function(view: GraphView, source: fx.Node, result: fx.Node) -> Callable[[Tensor], Tensor]:
    nodes = ancestors(result, source)

    def function(parameter: Tensor) -> Tensor:
        values = _evaluate(view, nodes, {source: parameter})
        if values is None:
            raise ValueError("the weight cannot be computed at another value of its parameter")
        computed: Tensor = values[result]
        return computed

    return function
