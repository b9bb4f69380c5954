"""The inverse of insert_taps."""

from __future__ import annotations

import torch
from torch import fx, nn

from kfac_fx.ops import STORE
from kfac_fx.passes.annotations import graphs_of, is_tap
from kfac_fx.passes.base import HERE, META, GraphPass
from kfac_fx.passes.recurrent_taps import replaces_node, restore

_LINK = torch.ops.kfac_fx.link.default


def strip_taps(graph: fx.Graph, module: nn.Module | None = None) -> bool:
    """Removes all taps and the reads that only they used; whether there were any.

    Args:
        module: whose graph it is; None for the graph's owner.
    """
    module = graph.owning_module if module is None else module
    taps = [node for node in graph.nodes if is_tap(node)]
    for tap in reversed(taps):  # readers of links before the links
        sources = tap.all_input_nodes
        for part in list(tap.users) if tap.target is _LINK else ():
            part.replace_all_uses_with(sources[0])
            graph.erase_node(part)
        if replaces_node(tap):
            restore(graph, tap, module)
        else:
            tap.replace_all_uses_with(sources[0])
            graph.erase_node(tap)
        for source in sources:
            if source.op == "get_attr" and not source.users:
                graph.erase_node(source)
    for node in list(graph.nodes):  # what taps read that another pass has removed
        if node.op == "get_attr" and str(node.target).startswith(f"{STORE}.") and not node.users:
            graph.erase_node(node)
    return bool(taps)


class StripTaps(GraphPass):
    """The inverse of InsertTaps: the graph that it found; the curvature graph and buffers go."""

    def run(self, module: fx.GraphModule) -> bool:
        """Whether there were taps."""
        found = [strip_taps(graph, module) for graph in graphs_of(module)]
        module._modules.pop(STORE, None)
        for key in (META, HERE):
            module.meta.pop(key, None)
        return any(found)
