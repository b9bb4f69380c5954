"""Write and read what taps say of themselves: plain values in ``node.meta["custom"]["kfac_fx"]``.

Of a node's meta only "custom" survives retracing by torch.export, its files and fx.Transformer. The
first tap of a graph carries the whole curvature graph, so that it can be read back from there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn

from kfac_fx.capture.captured_module import CapturedModule
from kfac_fx.errors import FormatError
from kfac_fx.ir.curvature_graph import CurvatureGraph

log = logging.getLogger("kfac_fx")

Fact = Any
"""A plain value in a node's meta: a number, a string, or a list or dictionary of those."""

KEY = "kfac_fx"
VERSION = 2
"""Format of the curvature graph that a tap carries; other versions are not read."""

KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")
"""Keys of the meta that a new node takes over from the node that it follows.

"is_wrapped" is not among them: it would make the generated code wrap the operator for fx.
"""

VALUE_META = ("val", "tensor_meta", "example_value", "type")
"""Keys that it takes over besides where its value is the same."""


def take_over(node: fx.Node, origin: fx.Node, *, same_value: bool, **facts: Fact) -> None:
    """Give a node the meta of its origin, and the annotation ``facts`` instead of the origin's.

    Args:
        node: a node of ours; its meta is replaced.
        origin: the node of the model that it follows.
        same_value: whether it returns what its origin returns, so that shapes hold for both.
        facts: what the node says of itself.
    """
    # Without "val" later passes and exports see a node of unknown shape; with the value of another
    # tensor they would see a wrong one.
    kept = KEPT_META + VALUE_META if same_value else KEPT_META
    node.meta = {key: origin.meta[key] for key in kept if key in origin.meta}
    annotate(node, **facts)


def annotate(node: fx.Node, **facts: Fact) -> None:
    """Replace the annotation of a node."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), KEY: facts}


def annotation(node: fx.Node) -> Mapping[str, Fact]:
    """Return what a node says of itself; empty for nodes that are not ours."""
    found = (node.meta.get("custom") or {}).get(KEY)
    return found if isinstance(found, Mapping) else {}


def without_annotation(meta: Mapping[str, Fact]) -> dict[str, Fact]:
    """Return the meta of a node without our annotation, for a node that is no longer ours."""
    custom = {key: value for key, value in (meta.get("custom") or {}).items() if key != KEY}
    rest = {key: value for key, value in meta.items() if key != "custom"}
    return rest | {"custom": custom} if custom else rest


def is_tap(node: fx.Node) -> bool:
    """Tell whether the node calls one of our operators."""
    return node.op == "call_function" and getattr(node.target, "namespace", None) == "kfac_fx"


def graphs_of(module: fx.GraphModule) -> tuple[fx.Graph, ...]:
    """Return the graphs of a module: of a captured one also that of its evaluation."""
    return module.graphs if isinstance(module, CapturedModule) else (module.graph,)


def taps_of(module: nn.Module) -> Iterator[fx.Node]:
    """Yield the taps of a module's graphs, and of the graph modules inside it."""
    for inner in (module, *(m for m in module.modules() if m is not module)):
        if isinstance(inner, fx.GraphModule):
            for graph in graphs_of(inner):
                yield from filter(is_tap, graph.nodes)


def write_curvature(module: fx.GraphModule, curvature: CurvatureGraph) -> None:
    """Put the curvature graph on the first tap of every graph.

    A module's own meta is lost when others retrace or export the graph; a node's annotation stays.

    Args:
        module: a module with taps.
        curvature: what is written, as plain values.
    """
    try:
        plain = {"version": VERSION, "graph": curvature.to_plain()}
    except FormatError as error:
        log.info("the taps do not carry the curvature graph: %s", error)
        return
    # Every graph gets it: the training graph and that of the evaluation may be exported apart.
    for graph in graphs_of(module):
        first = next(filter(is_tap, graph.nodes), None)
        if first is not None:
            annotate(first, **annotation(first), curvature=plain)


def read_curvature(module: nn.Module) -> CurvatureGraph | None:
    """Return the curvature graph that a tap of the module carries, None where none does."""
    for tap in taps_of(module):
        plain = annotation(tap).get("curvature")
        if plain is not None and plain.get("version") == VERSION:
            try:
                return CurvatureGraph.from_plain(plain["graph"])
            except FormatError:
                continue  # somebody else's value under our key
    return None
