"""What taps say of themselves: plain values in ``node.meta["custom"]["kfac_fx"]``.

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

KEY = "kfac_fx"
VERSION = 2
"""Of what is written; other versions are not read."""

KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")
"""What a node that is made takes over from the node that it follows.

Not "is_wrapped", which would make the generated code wrap the operator for fx.
"""

VALUE_META = ("val", "tensor_meta", "example_value", "type")
"""What it takes over besides where its value is the same."""


def take_over(node: fx.Node, origin: fx.Node, *, same_value: bool, **facts: Any) -> None:
    """Gives a node the meta of its origin, and the annotation ``facts`` instead of the origin's."""
    kept = KEPT_META + VALUE_META if same_value else KEPT_META
    node.meta = {key: origin.meta[key] for key in kept if key in origin.meta}
    annotate(node, **facts)


def annotate(node: fx.Node, **facts: Any) -> None:
    """Replaces the annotation of a node."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), KEY: facts}


def annotation(node: fx.Node) -> Mapping[str, Any]:
    """What a node says of itself; empty for those that are not ours."""
    found = (node.meta.get("custom") or {}).get(KEY)
    return found if isinstance(found, Mapping) else {}


def without_annotation(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The meta of a node that is no longer ours."""
    custom = {key: value for key, value in (meta.get("custom") or {}).items() if key != KEY}
    rest = {key: value for key, value in meta.items() if key != "custom"}
    return rest | {"custom": custom} if custom else rest


def is_tap(node: fx.Node) -> bool:
    """Whether the node is one of our operators."""
    return node.op == "call_function" and getattr(node.target, "namespace", None) == "kfac_fx"


def graphs_of(module: fx.GraphModule) -> tuple[fx.Graph, ...]:
    """The graphs of a module: of a captured one also that of its evaluation."""
    return module.graphs if isinstance(module, CapturedModule) else (module.graph,)


def taps_of(module: nn.Module) -> Iterator[fx.Node]:
    """The taps of a module's graphs, and of those of the graph modules that it calls."""
    for inner in (module, *(m for m in module.modules() if m is not module)):
        if isinstance(inner, fx.GraphModule):
            for graph in graphs_of(inner):
                yield from filter(is_tap, graph.nodes)


def write_curvature(module: fx.GraphModule, curvature: CurvatureGraph) -> None:
    """Puts the curvature graph on the first tap of every graph."""
    try:
        plain = {"version": VERSION, "graph": curvature.to_plain()}
    except FormatError as error:
        log.info("the taps do not carry the curvature graph: %s", error)
        return
    for graph in graphs_of(module):
        first = next(filter(is_tap, graph.nodes), None)
        if first is not None:
            annotate(first, **annotation(first), curvature=plain)


def read_curvature(module: nn.Module) -> CurvatureGraph | None:
    """The curvature graph that a tap of the module carries, if one does."""
    for tap in taps_of(module):
        plain = annotation(tap).get("curvature")
        if plain is not None and plain.get("version") == VERSION:
            try:
                return CurvatureGraph.from_plain(plain["graph"])
            except FormatError:
                continue  # somebody else's value under our key
    return None
