"""Insert what records the cross factors of pairs of blocks.

A cross factor needs both layers at once: A_ij their inputs, G_ij their derivatives. The forward
meets the earlier layer first and the backward the later one, so a link at the earlier layer hands a
value without memory to the later one, along which its derivatives come back.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

import torch
from torch import fx, nn

from kfac_fx.capture.dialect import Argument
from kfac_fx.ir.curvature_graph import CurvatureBlock, CurvatureGraph, Pair
from kfac_fx.ops.net_buffers import STORE
from kfac_fx.passes.annotations import take_over
from kfac_fx.passes.coupled_uses import taps_of_couplings, text_of_side
from kfac_fx.passes.tap_buffers import add_slot, read_attribute

_LINK = torch.ops.kfac_fx.link.default
_COUPLE = torch.ops.kfac_fx.couple.default


def add_cross_buffers(module: nn.Module, curvature: CurvatureGraph) -> None:
    """Add a slot for each pair, in the precision of the earlier block's."""
    store = module.get_submodule(STORE)
    slots = {name: block.slot for name, block in curvature.blocks.items()}
    for pair in curvature.pairs:
        like = next(store.get_submodule(slots[pair.earlier]).buffers())
        add_slot(store, pair.slot, pair.factors, like)


def insert_links(
    module: nn.Module,
    graph: fx.Graph,
    blocks: Mapping[str, CurvatureBlock],
    pairs: Iterable[Pair],
) -> None:
    """Insert a link at the earlier use of every pair, and what reads it at the later one.

    Args:
        module: whose graph it is.
        graph: a graph with taps.
        blocks: the blocks as found in this graph; a pair that is not there, or in another order, is
            left out.
        pairs: those that have buffers.
    """
    names = taps_of_couplings(graph)
    order = {node: index for index, node in enumerate(graph.nodes)}
    # A block may have links and couples of several pairs: each goes after the one before, so that
    # the last one is what the model's own nodes read.
    ends = dict(names)
    for pair in pairs:
        first, last = names.get(pair.earlier), names.get(pair.later)
        if first is None or last is None or order[first] > order[last]:
            continue
        sides = [text_of_side(module, blocks[name]) for name in (pair.earlier, pair.later)]
        passed, handed = _insert_link(graph, ends[pair.earlier], pair, sides[0])
        ends[pair.earlier] = passed
        # The taps' own inputs: what the layers multiply, and not what they were tapped on.
        inputs = last.args[1], first.args[1], handed
        ends[pair.later] = _insert_couple(graph, ends[pair.later], inputs, pair, sides)


def _insert_link(graph: fx.Graph, y: fx.Node, pair: Pair, side: str) -> tuple[fx.Node, fx.Node]:
    """Insert a link after y; return y as its users go on with it, and what the later use reads."""
    with graph.inserting_after(y):
        G = read_attribute(graph, f"{STORE}.{pair.slot}.G")
    with graph.inserting_after(G):
        link = graph.call_function(_LINK, (y, G, side))
    with graph.inserting_after(link):
        handed = graph.call_function(operator.getitem, (link, 1))
        passed = graph.call_function(operator.getitem, (link, 0))
    _take_over(y, passed, link, pair)
    handed.meta = {"custom": link.meta["custom"]}
    value = y.meta.get("val")
    # Others read shapes from "val". What is handed on is empty while nothing is recorded, and that
    # is what torch.export sees.
    if isinstance(value, torch.Tensor):
        handed.meta["val"] = value.new_empty(0)
        link.meta["val"] = (value, handed.meta["val"])
    return passed, handed


def _insert_couple(
    graph: fx.Graph, y: fx.Node, inputs: tuple[Argument, ...], pair: Pair, sides: list[str]
) -> fx.Node:
    """Insert the operator that records a pair, and return y as its users go on with it.

    Args:
        graph: is changed in place.
        y: the later use's output, after its taps.
        inputs: x_j and x_i, what the later and the earlier use read, and the link.
        pair: says which buffers it fills.
        sides: the earlier and the later use, as text.
    """
    with graph.inserting_after(y):
        A = read_attribute(graph, f"{STORE}.{pair.slot}.A")
    with graph.inserting_after(A):
        couple = graph.call_function(_COUPLE, (y, *inputs, A, sides[1], sides[0], pair.ordered))
    _take_over(y, couple, couple, pair)
    return couple


def _take_over(y: fx.Node, new: fx.Node, reader: fx.Node, pair: Pair) -> None:
    """Let users of y read ``new`` from now on, but for ``reader``, which makes it."""
    for made in {new, reader}:
        take_over(made, y, same_value=made is new, pair=[pair.earlier, pair.later])
    for user in list(y.users):
        if user is not reader:
            user.replace_input_with(y, new)
