"""Inserts the taps of a curvature graph and the buffers that they fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from kfac_fx.capture.module import CapturedModule
from kfac_fx.ir import CurvatureBlock, NodeRef, ParameterUse
from kfac_fx.ops import STORE
from kfac_fx.passes.insert_links import add_cross_buffers, insert_links
from kfac_fx.passes.insert_moments import add_moment_buffers, insert_moments
from kfac_fx.passes.replace_node import fill
from kfac_fx.passes.store import add_slot, read_attribute

KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")
"""What a tap takes over from the node that it records."""


def add_factor_buffers(module: nn.Module, blocks: Mapping[str, CurvatureBlock]) -> None:
    """A slot for each block, in its parameters' precision but at least float32."""
    parameters = dict(module.named_parameters())
    store = nn.Module()
    for block in (block for block in blocks.values() if block.tapped):
        parameter = parameters[block.parameters[0]]
        dtype = torch.promote_types(parameter.dtype, torch.float32).to_real()
        add_slot(store, block.slot, block.factors, parameter.new_empty(0, dtype=dtype))
    module.add_module(STORE, store)


def insert_taps(
    graph: fx.Graph, blocks: Mapping[str, CurvatureBlock], here: Mapping[str, CurvatureBlock]
) -> None:
    """Rewrites ``graph`` so that every use with a tap is recorded.

    Args:
        blocks: those that have factor buffers.
        here: the blocks that this graph's own uses make. A block of another form is left out (a
            model whose evaluation differs from its training).
    """
    nodes = {node.name: node for node in graph.nodes}
    for name, block in here.items():
        recorded = blocks.get(name)
        if recorded is None or not set(block.factors) <= set(recorded.factors):
            continue
        for use in block.uses:
            if use.tap is not None:
                _insert(graph, nodes, use, recorded)
    graph.lint()


def _insert(
    graph: fx.Graph, nodes: dict[str, fx.Node], use: ParameterUse, block: CurvatureBlock
) -> None:
    tap = use.tap
    assert tap is not None
    tapped = nodes[tap.node]
    place = tapped if tap.consumer is None else nodes[tap.consumer].prev
    users = list(tapped.users) if tap.consumer is None else [nodes[tap.consumer]]

    def resolve(value: Any) -> Any:
        if isinstance(value, NodeRef):
            if value.name.startswith("."):
                return read_attribute(graph, value.name[1:])
            return nodes[value.name]
        return [resolve(entry) for entry in value] if isinstance(value, tuple) else value

    paths = [f"{STORE}.{block.slot}.{factor.name}" for factor in use.factors]
    if tap.slots:
        fill(
            graph,
            nodes,
            tap,
            block.name,
            lambda: [read_attribute(graph, p) for p in paths],
            resolve,
        )
        return
    with graph.inserting_after(place):
        anchor = graph.create_node("call_function", _nothing)
    with graph.inserting_before(anchor):
        tensors = [resolve(tensor) for tensor in tap.tensors]
        factors: list[fx.Node | None] = [read_attribute(graph, path) for path in paths]
        if tap.scale is not None:
            result, source, rows, entrywise, _ = tap.scale
            scaled = (factors[1], resolve(result), resolve(source), rows, entrywise)
            factors[1] = graph.call_function(torch.ops.kfac_fx.row_scaled.default, scaled)
        if use.approximation == "kronecker" and len(factors) == 2:
            factors.append(None)  # no positions to count for a single use
        options = [resolve(option) for option in tap.options]
        operator = getattr(torch.ops.kfac_fx, tap.operator).default
        call = graph.call_function(operator, (tapped, *tensors, *factors, *options))
    graph.erase_node(anchor)
    # Not "is_wrapped", which would make the generated code wrap the operator for fx.
    call.meta = {key: tapped.meta[key] for key in KEPT_META if key in tapped.meta}
    call.meta["custom"] = {**call.meta.get("custom", {}), "kfac_fx": block.name}
    for user in users:
        user.replace_input_with(tapped, call)


def _nothing() -> None:
    """Marks a place in the graph while a tap is being built."""


def is_tap(node: fx.Node) -> bool:
    """Whether the node is one of our operators."""
    return node.op == "call_function" and getattr(node.target, "namespace", None) == "kfac_fx"


def instrument(module: CapturedModule, found: Sequence[Mapping[str, CurvatureBlock]]) -> None:
    """Buffers for the module's blocks, and taps for each graph from the blocks found in it."""
    blocks = module.curvature.blocks
    add_factor_buffers(module, blocks)
    add_cross_buffers(module, module.curvature)
    add_moment_buffers(module, module.curvature)
    for graph, here in zip(module.graphs, found, strict=True):
        insert_taps(graph, blocks, here)
        insert_links(module, graph, here, module.curvature.pairs)
        insert_moments(module, graph, here, module.curvature)
    module.recompile()
