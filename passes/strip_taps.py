"""Remove taps: the inverse of insert_taps."""

from __future__ import annotations

import copy
from collections.abc import Collection, Hashable

import torch
from torch import fx, nn

from kfac_fx.capture.captured_module import register_shortcut
from kfac_fx.ops.net_buffers import STORE, recording_slots
from kfac_fx.ops.tap import bound_tap
from kfac_fx.passes.annotations import graphs_of, is_tap
from kfac_fx.passes.base import META, OTHER_BLOCKS, GraphPass
from kfac_fx.passes.recurrent_taps import replaces_node, restore
from kfac_fx.torch_internals.onlookers import forward_mode, watched

_LINK = torch.ops.kfac_fx.link.default


def strip_taps(
    graph: fx.Graph, module: nn.Module | None = None, keep: Collection[str] = ()
) -> bool:
    """Remove taps and the reads that only they used, and tell whether there were any.

    Args:
        graph: is changed in place.
        module: whose graph it is; None for the graph's owner.
        keep: slots of the factor buffers whose taps stay.
    """
    module = graph.owning_module if module is None else module
    kept = set(keep)
    # Views around a tap read no buffer: they go where all taps do.
    taps = [
        node
        for node in graph.nodes
        if is_tap(node) and (not kept or ((slots := _slots(node)) and slots.isdisjoint(kept)))
    ]
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


def _slots(tap: fx.Node) -> set[str]:
    """Return the slots of the buffers that a tap records into."""
    read = [str(node.target).split(".") for node in tap.all_input_nodes if node.op == "get_attr"]
    return {path[1] for path in read if path[0] == STORE and len(path) > 1}


class FewerTaps:
    """The form of a graph for passes that record into some buffers alone, or into none.

    Calling an operator and reading its buffers costs as much as a small layer does. So taps that
    are off are left out, and the others are called past torch's dispatcher, with options that are
    read once.
    """

    def applies(self, graph: fx.Graph) -> bool:
        """Say whether there are taps."""
        return any(map(is_tap, graph.nodes))

    def shortened(self, graph: fx.Graph, module: fx.GraphModule, form: Hashable) -> fx.Graph:
        """Return a copy of a module's graph with the taps of the form's slots."""
        assert isinstance(form, tuple)
        short = copy.deepcopy(graph)
        strip_taps(short, module, form)
        for node in short.nodes if form else ():
            bound = bound_tap(node)
            if bound is not None:
                node.target, node.args = bound
        return short

    def form(self, module: nn.Module) -> tuple[str, ...] | None:
        """Return the slots that taps have to record into; None where somebody looks on."""
        # Whoever traces a pass keeps what he sees: taps that are off now may be on in his graph.
        if watched():
            return None
        # Without gradients nothing is recorded either, but for derivatives in forward mode.
        return recording_slots(module) if torch.is_grad_enabled() or forward_mode() else ()


register_shortcut(FewerTaps())
