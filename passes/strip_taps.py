"""Remove taps: the inverse of insert_taps."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn

from kfac_fx.capture.captured_module import register_shortcut
from kfac_fx.ops.net_buffers import STORE, records
from kfac_fx.passes.annotations import graphs_of, is_tap
from kfac_fx.passes.base import META, OTHER_BLOCKS, GraphPass
from kfac_fx.passes.recurrent_taps import replaces_node, restore
from kfac_fx.torch_internals.onlookers import forward_mode, watched

_LINK = torch.ops.kfac_fx.link.default


def strip_taps(graph: fx.Graph, module: nn.Module | None = None) -> bool:
    """Remove all taps and the reads that only they used, and tell whether there were any.

    Args:
        graph: is changed in place.
        module: whose graph it is; None for the graph's owner.
    """
    module = graph.owning_module if module is None else module
    taps = [node for node in graph.nodes if is_tap(node)]
    for tap in reversed(taps):  # readers of links before the links
        sources = tap.all_input_nodes
        # A link returns y and what it hands on, each taken out of it by a node of its own.
        for part in list(tap.users) if tap.target is _LINK else ():
            part.replace_all_uses_with(sources[0])
            graph.erase_node(part)
        if replaces_node(tap):
            restore(graph, tap, module)
        else:
            tap.replace_all_uses_with(sources[0])
            graph.erase_node(tap)
        # A buffer that only this tap read is read by nobody now.
        for source in sources:
            if source.op == "get_attr" and not source.users:
                graph.erase_node(source)
    for node in list(graph.nodes):  # what taps read that another pass has removed
        if node.op == "get_attr" and str(node.target).startswith(f"{STORE}.") and not node.users:
            graph.erase_node(node)
    return bool(taps)


class StripTaps(GraphPass):
    """Undo InsertTaps: graphs are again what it found, and the curvature graph and buffers go.

    Code and meta of every node are the same as before, so that a graph can be handed on to others.
    """

    def run(self, module: fx.GraphModule) -> bool:
        """Tell whether there were taps."""
        found = [strip_taps(graph, module) for graph in graphs_of(module)]
        module._modules.pop(STORE, None)
        for key in (META, OTHER_BLOCKS):
            module.meta.pop(key, None)
        return any(found)


class WithoutTaps:
    """The form of a graph for passes that record nothing: the taps return what they are given.

    Calling an operator and reading its buffers costs as much as a small layer does.
    """

    def applies(self, graph: fx.Graph) -> bool:
        """Say whether there are taps."""
        return any(map(is_tap, graph.nodes))

    def shortened(self, graph: fx.Graph, module: fx.GraphModule) -> fx.Graph:
        """Return a copy of a module's graph without its taps."""
        bare = copy.deepcopy(graph)
        strip_taps(bare, module)
        return bare

    def open(self, module: nn.Module) -> bool:
        """Say whether taps have nothing to record, and nobody looks on who should see them."""
        # Whoever traces a pass keeps what he sees: taps that are off now may be on in his graph.
        if watched():
            return False
        # Without gradients nothing is recorded either, but for derivatives in forward mode.
        return not records(module) or not (torch.is_grad_enabled() or forward_mode())


register_shortcut(WithoutTaps())
