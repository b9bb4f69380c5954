"""Insert the taps of a curvature graph, and the buffers that they fill.

A tap is one operator on the tensor that a use reads or makes. It returns that tensor, and its
backward forms the statistics of the use as gradients of its buffers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from kfac_fx.capture.dialect import Argument
from kfac_fx.errors import PassError
from kfac_fx.ir.curvature_graph import CurvatureBlock, CurvatureGraph
from kfac_fx.ir.use import CaseView, NodeRef, ParameterUse
from kfac_fx.ops.case_first import WITHIN, cases_first
from kfac_fx.ops.case_share import not_cases
from kfac_fx.ops.net_buffers import STORE
from kfac_fx.passes.annotations import graphs_of, take_over, write_curvature
from kfac_fx.passes.base import OTHER_BLOCKS, GraphPass, curvature_of, has_taps
from kfac_fx.passes.insert_links import add_cross_buffers, insert_links
from kfac_fx.passes.insert_moments import add_moment_buffers, insert_moments
from kfac_fx.passes.recurrent_taps import fill
from kfac_fx.passes.tap_buffers import add_slot, read_attribute


def add_factor_buffers(module: nn.Module, blocks: Mapping[str, CurvatureBlock]) -> None:
    """Add a slot for each block, in its parameters' precision but at least float32.

    Statistics are sums over many cases, which half precisions cannot hold.

    Args:
        module: gets the submodule that holds the slots.
        blocks: blocks without a tap get none.
    """
    parameters = dict(module.named_parameters())
    store = module._modules.get(STORE) or nn.Module()
    for block in (block for block in blocks.values() if block.tapped):
        parameter = parameters[block.parameters[0]]
        dtype = torch.promote_types(parameter.dtype, torch.float32).to_real()
        add_slot(store, block.slot, block.factors, parameter.new_empty(0, dtype=dtype))
    module.add_module(STORE, store)


def insert_taps(
    graph: fx.Graph, blocks: Mapping[str, CurvatureBlock], here: Mapping[str, CurvatureBlock]
) -> None:
    """Rewrite ``graph`` so that every use with a tap is recorded.

    Args:
        graph: is changed in place.
        blocks: those that have factor buffers.
        here: the blocks that this graph's own uses make. A block of another form is left out (a
            model whose evaluation differs from its training).
    """
    nodes = {node.name: node for node in graph.nodes}
    for name, block in here.items():
        # Factors of another form would have other shapes than the buffers have.
        recorded = blocks.get(name)
        if recorded is None or not set(block.factors) <= set(recorded.factors):
            continue
        firsts: dict[int, _Counted] = {}
        for use in block.uses:
            if use.tap is not None:
                _insert(graph, nodes, use, recorded, firsts)


class _Counted(NamedTuple):
    """What counts the cases of a use.

    Attributes:
        x: what the use reads, with the cases first.
        others: the dimensions of it that count neither cases nor positions.
    """

    x: fx.Node
    others: list[int]


def _insert(
    graph: fx.Graph,
    nodes: dict[str, fx.Node],
    use: ParameterUse,
    block: CurvatureBlock,
    firsts: dict[int, _Counted],
) -> None:
    """Insert the tap of one use.

    Args:
        graph: is changed in place.
        nodes: the nodes of the graph before any tap, by name.
        use: has a tap.
        block: owns the buffers.
        firsts: the first use of each form, by which the others' cases are counted; gets it.
    """
    tap = use.tap
    assert tap is not None
    tapped = nodes[tap.node]
    place = tapped if tap.consumer is None else nodes[tap.consumer].prev
    users = list(tapped.users) if tap.consumer is None else [nodes[tap.consumer]]

    def resolve(value: Argument) -> Argument:
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
    # What the tap reads is inserted in order before one anchor, so that reads of buffers come
    # before the tap and the tap comes before every user.
    with graph.inserting_after(place):
        anchor = graph.create_node("call_function", _nothing)
    with graph.inserting_before(anchor):
        seen = tapped
        tensors = [resolve(tensor) for tensor in tap.tensors]
        if tap.cases is not None:
            view = partial(_cases_first, graph, tap.cases, nodes)
            if tap.consumer is not None:
                # A parameter's dimensions count from the right: those of the other operand.
                seen = graph.call_function(torch.ops.kfac_fx.dims_of.default, (tapped, tensors[0]))
                take_over(seen, tapped, same_value=False, cases=[tapped.name])
            if tap.cases.dim == WITHIN:
                assert tap.cases.like is not None
                tensors = [*tensors, nodes[tap.cases.like.name]]
            else:
                seen = view(seen)
                # Running moments of a norm, which follow its input, have no cases.
                tensors = [*map(view, tensors[:1]), *tensors[1:]]
        factors: list[fx.Node | None] = [read_attribute(graph, path) for path in paths]
        if tap.scale is not None:
            # The weight W that meets the data is computed from the parameter V: the derivative of
            # the output is scaled, row by row, before it enters G, which is that of V then.
            factors[1] = graph.call_function(
                torch.ops.kfac_fx.row_scaled.default,
                (
                    factors[1],
                    resolve(tap.scale.result),
                    resolve(tap.scale.source),
                    tap.scale.rows,
                    tap.scale.entrywise,
                ),
            )
        _share(graph, use, tensors, factors, firsts)
        if use.products == 1 and len(factors) == 2:
            factors.append(None)  # no positions to count for a single use
        options = [resolve(option) for option in tap.options]
        operator = getattr(torch.ops.kfac_fx, tap.operator).default
        call = graph.call_function(operator, (seen, *tensors, *factors, *options))
        take_over(call, seen, same_value=True, blocks=[block.name])
        result = call
        if tap.cases is not None and tap.cases.dim != WITHIN:
            if tap.cases.like is not None and tap.consumer is not None:
                rows = resolve(tap.tensors[0])
                result = graph.call_function(torch.ops.kfac_fx.each_row.default, (call, rows))
            else:
                back = torch.ops.kfac_fx.cases_back.default
                result = graph.call_function(back, (call, tap.cases.dim, tapped))
            take_over(result, tapped, same_value=True, cases=[block.name])
    graph.erase_node(anchor)
    for user in users:
        user.replace_input_with(tapped, result)


def _share(
    graph: fx.Graph,
    use: ParameterUse,
    tensors: list[Any],
    factors: list[fx.Node | None],
    firsts: dict[int, _Counted],
) -> None:
    """Let a use weigh its rows as the first use of its form does; see ``ops/case_share.py``.

    Args:
        graph: is changed at the present place.
        use: has a tap.
        tensors: what the tap reads, with the cases first.
        factors: the buffers of the tap; those of A and of the positions are replaced.
        firsts: the first use of each form; gets this one if there is none.
    """
    tap = use.tap
    assert tap is not None
    counts = use.factors[-1].role == "count"
    others = not_cases(tap.operator, tap.options) if counts else None
    # Positions that are looked up once for all cases take their number from another tensor.
    if others is None or any(isinstance(t, fx.Node) for t in tensors[1:]):
        return
    here = _Counted(tensors[0], others)
    first = firsts.setdefault(use.factors[0].form, here)
    if first is here:
        return
    for place in (0, -1):
        given = (factors[place], here.x, here.others, first.x, first.others)
        factors[place] = made = graph.call_function(torch.ops.kfac_fx.shared.default, given)
        value = here.x.meta.get("val")
        # Programs of torch.export refuse a node without a value, and buffers get theirs later.
        if isinstance(value, torch.Tensor):
            made.meta["val"] = value.new_empty(use.factors[place].shape)


def _cases_first(
    graph: fx.Graph, cases: CaseView, nodes: Mapping[str, fx.Node], node: fx.Node
) -> fx.Node:
    """Insert a view of a node with its cases first, and return it.

    Args:
        graph: is changed at the present place.
        cases: where they are.
        nodes: the nodes of the graph before any tap, by name.
        node: what a tap stands on or reads.
    """
    like = None if cases.like is None else nodes[cases.like.name]
    seen = graph.call_function(torch.ops.kfac_fx.cases_first.default, (node, cases.dim, like))
    take_over(seen, node, same_value=False, cases=[node.name])
    value = node.meta.get("val")
    counted = None if like is None else like.meta.get("val")
    if isinstance(value, torch.Tensor) and (like is None or counted is not None):
        seen.meta["val"] = cases_first(value, cases.dim, counted)
    return seen


def _nothing() -> None:
    """Mark a place in the graph while a tap is being built."""


def add_buffers(module: nn.Module, curvature: CurvatureGraph) -> None:
    """Add all buffers of a curvature graph and remove others; those that fit already stay.

    Args:
        module: owns the parameters and gets the buffers.
        curvature: says which there are.
    """
    add_factor_buffers(module, curvature.blocks)
    add_cross_buffers(module, curvature)
    add_moment_buffers(module, curvature)
    wanted = {block.slot for block in curvature.blocks.values() if block.tapped}
    wanted |= {pair.slot for pair in curvature.pairs} | {m.slot for m in curvature.moments}
    slots = module.get_submodule(STORE)._modules
    # Another transform of the same module may have had other blocks.
    for name in slots.keys() - wanted:
        del slots[name]
    # DistributedDataParallel broadcasts buffers in every forward pass: it would write to those of
    # taps, which have no memory. It reads this attribute, and has no public way to leave some out.
    names = [name for name, _ in module.named_buffers() if name.startswith(f"{STORE}.")]
    module._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]


def instrument(
    module: nn.Module,
    graph: fx.Graph,
    here: Mapping[str, CurvatureBlock],
    curvature: CurvatureGraph,
) -> None:
    """Insert all that records into one graph; the module has the buffers.

    Args:
        module: whose graph it is.
        graph: is changed in place.
        here: the blocks that this graph's own uses make.
        curvature: the blocks that have buffers, and their pairs and moments.
    """
    insert_taps(graph, curvature.blocks, here)
    insert_links(module, graph, here, curvature.pairs)
    insert_moments(module, graph, here, curvature)


class InsertTaps(GraphPass):
    """Insert the taps of the module's curvature graph, and buffers; taps that are there stay."""

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise PassError where uses were not found, or the graph is no longer the one read."""
        nodes = {node.name for node in graphs_of(graph_module)[0].nodes}
        curvature = curvature_of(graph_module, "InsertTaps")
        known = all(u.node in nodes for b in curvature.blocks.values() for u in b.uses)
        known &= len(_here(graph_module)) == len(graphs_of(graph_module))
        if not known and not has_taps(graph_module):
            raise PassError("InsertTaps: the graph has changed since FindUses; run that again")

    def run(self, module: fx.GraphModule) -> bool:
        """Tell whether there was a tap to insert."""
        if has_taps(module):
            return False
        curvature = curvature_of(module, "InsertTaps")
        add_buffers(module, curvature)
        for graph, here in zip(graphs_of(module), _here(module), strict=True):
            instrument(module, graph, here, curvature)
        module.meta.pop(OTHER_BLOCKS, None)
        write_curvature(module, curvature)
        return has_taps(module)


def _here(module: fx.GraphModule) -> list[Mapping[str, CurvatureBlock]]:
    """Return the blocks that each graph's own uses make, in the order of ``graphs_of``."""
    return [curvature_of(module, "InsertTaps").blocks, *module.meta.get(OTHER_BLOCKS, ())]
