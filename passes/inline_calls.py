"""Inline the graphs that a graph calls: those of split modules and of activation checkpoints.

A call of another GraphModule is opaque to the rules, and taps inside it would be hidden from edges
and couplings.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping

import torch
from torch import fx

from kfac_fx.capture.dialect import Argument
from kfac_fx.passes.annotations import graphs_of
from kfac_fx.passes.base import GraphPass
from kfac_fx.torch_internals.graph_code import unpacks_inputs

log = logging.getLogger("kfac_fx")

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
_WRAPPED = "_checkpoint_wrapped_module"
"""Attribute in which torch.distributed's checkpoint_wrapper keeps what it wraps."""


class InlineCalls(GraphPass):
    """Let the module's own graph do what GraphModules do that it calls.

    Names of parameters stay. Activation checkpoints within the graph are looked through: they save
    no memory any more, since a tap in a part that runs twice would record it twice.
    """

    def run(self, module: fx.GraphModule) -> bool:
        """Tell whether there was such a call."""
        changed = False
        for graph in graphs_of(module):
            # What was inlined may call further graphs, so its nodes are looked at as well.
            todo = list(graph.nodes)
            while todo:
                node = todo.pop()
                if node.op == "call_module":
                    todo += _open_module(module, graph, node)
                elif node.op == "call_function" and node.target is _CHECKPOINT:
                    todo += _open_checkpoint(module, graph, node)
                changed |= node._erased
        return changed


def _open_module(module: fx.GraphModule, graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """Return the nodes that took the place of a call, none where the call stays."""
    path = str(node.target)
    called = module.get_submodule(path)
    # The wrapper's forward is a checkpoint, which no tracer follows; what it wraps is called as it
    # stands, and its parameters keep their names.
    if hasattr(called, _WRAPPED):
        log.info("the activation checkpoint around %s is looked through", path)
        with graph.inserting_before(node):
            plain = graph.call_module(f"{path}.{_WRAPPED}", node.args, node.kwargs)
        plain.meta = dict(node.meta)
        node.replace_all_uses_with(plain)
        graph.erase_node(node)
        return [plain]
    if not isinstance(called, fx.GraphModule) or unpacks_inputs(called.graph):
        return []
    # Hooks would no longer run; a graph that unpacks nested inputs takes other arguments.
    if called._forward_hooks or called._forward_pre_hooks:
        return []
    return inline(graph, node, called.graph, path + ".", node.args, node.kwargs)


def _open_checkpoint(module: fx.GraphModule, graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """Return the nodes that took the place of a checkpoint, none where it stays."""
    body, *args = node.args
    assert isinstance(body, fx.Node)
    called = module.get_submodule(str(body.target))
    if not isinstance(called, fx.GraphModule):
        return []
    log.info("the activation checkpoint %s is looked through", node.name)
    made = inline(graph, node, called.graph, f"{body.target}.", tuple(args), {})
    # Several calls may share one body; the last one takes it away.
    if not body.users:
        graph.erase_node(body)
    return made


def inline(
    graph: fx.Graph,
    node: fx.Node,
    inner: fx.Graph,
    prefix: str,
    args: tuple[Argument, ...],
    kwargs: Mapping[str, Argument],
) -> list[fx.Node]:
    """Put a copy of ``inner`` in the place of ``node``, and return the nodes that were made.

    Args:
        graph: is changed in place.
        node: is erased; its users read the result of the copy.
        inner: the graph to copy; it is not changed.
        prefix: is put in front of the paths that the copy reads or calls.
        args: values of the placeholders of ``inner``, in order.
        kwargs: values of those that are left, by name.
    """
    values: dict[fx.Node, Argument] = {}
    made = []
    given = iter(args)
    result: Argument = None
    for source in inner.nodes:
        if source.op == "placeholder":
            default = kwargs.get(str(source.target), source.args[0] if source.args else None)
            values[source] = next(given, default)
        elif source.op == "output":
            result = fx.node.map_arg(source.args[0], values.__getitem__)
        else:
            with graph.inserting_before(node):
                copied = graph.node_copy(source, values.__getitem__)
            # Paths in the inner graph are relative to the module that owns it.
            if source.op in ("get_attr", "call_module"):
                copied.target = prefix + str(source.target)
            values[source] = copied
            made.append(copied)
    _replace(graph, node, result)
    return made


def _replace(graph: fx.Graph, node: fx.Node, result: Argument) -> None:
    """Let users read the result, which may be a structure of nodes."""
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    for user in list(node.users):
        # A tuple is no node: what takes an entry out of it reads that entry itself.
        if user.target is operator.getitem and isinstance(result, (tuple, list, dict)):
            part = result[user.args[1]]  # type: ignore[index]
            if isinstance(part, fx.Node):
                user.replace_all_uses_with(part)
                graph.erase_node(user)
                continue
        user.args = fx.node.map_arg(user.args, lambda n: result if n is node else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: result if n is node else n)
    graph.erase_node(node)
