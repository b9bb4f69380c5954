"""Calls of graphs within a graph become a part of it: of split modules, and behind checkpoints."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from kfac_fx.passes.annotations import graphs_of
from kfac_fx.passes.base import GraphPass
from kfac_fx.torch_internals.graph_code import unpacks_inputs

log = logging.getLogger("kfac_fx")

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
_WRAPPED = "_checkpoint_wrapped_module"
"""Where torch.distributed's checkpoint_wrapper keeps what it wraps."""


class InlineCalls(GraphPass):
    """What other GraphModules do that the module calls is done by its own graph.

    Names of parameters stay. Activation checkpoints within the graph are looked through: they save
    no memory any more.
    """

    def run(self, module: fx.GraphModule) -> bool:
        """Whether there was such a call."""
        changed = False
        for graph in graphs_of(module):
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
    """The nodes that took the place of a call."""
    path = str(node.target)
    called = module.get_submodule(path)
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
    if called._forward_hooks or called._forward_pre_hooks:
        return []
    return inline(graph, node, called.graph, path + ".", node.args, node.kwargs)


def _open_checkpoint(module: fx.GraphModule, graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    body, *args = node.args
    assert isinstance(body, fx.Node)
    called = module.get_submodule(str(body.target))
    if not isinstance(called, fx.GraphModule):
        return []
    log.info("the activation checkpoint %s is looked through", node.name)
    made = inline(graph, node, called.graph, f"{body.target}.", tuple(args), {})
    if not body.users:
        graph.erase_node(body)
    return made


def inline(
    graph: fx.Graph,
    node: fx.Node,
    inner: fx.Graph,
    prefix: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> list[fx.Node]:
    """Puts a copy of ``inner`` in the place of ``node``; ``args`` are its inputs."""
    values: dict[fx.Node, Any] = {}
    made = []
    given = iter(args)
    result: Any = None
    for source in inner.nodes:
        if source.op == "placeholder":
            default = kwargs.get(str(source.target), source.args[0] if source.args else None)
            values[source] = next(given, default)
        elif source.op == "output":
            result = fx.node.map_arg(source.args[0], values.__getitem__)
        else:
            with graph.inserting_before(node):
                copied = graph.node_copy(source, values.__getitem__)
            if source.op in ("get_attr", "call_module"):
                copied.target = prefix + str(source.target)
            values[source] = copied
            made.append(copied)
    _replace(graph, node, result)
    return made


def _replace(graph: fx.Graph, node: fx.Node, result: Any) -> None:
    """Lets users read the result, which may be a structure of nodes."""
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(result, (tuple, list, dict)):
            part = result[user.args[1]]  # type: ignore[index]
            if isinstance(part, fx.Node):
                user.replace_all_uses_with(part)
                graph.erase_node(user)
                continue
        user.args = fx.node.map_arg(user.args, lambda n: result if n is node else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: result if n is node else n)
    graph.erase_node(node)
