"""Parts of programs, for processes that share the work."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from kfac_fx.codegen.builder import ProgramBuilder
from kfac_fx.codegen.emit import inverse_names, scatter, terms
from kfac_fx.codegen.forms import FORMS, Forms
from kfac_fx.codegen.refresher import FLAGS
from kfac_fx.ir import Coupling, CurvatureGraph

if TYPE_CHECKING:
    from kfac_fx.codegen.program import Program


def part_of_refresh(refresh: fx.GraphModule, wanted: Collection[str]) -> fx.GraphModule:
    """The program of some of the inverses, with the flags of all that it needs; same arguments."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    outputs: Any = graph.graph_copy(refresh.graph, copies)
    needed: set[fx.Node] = set()
    todo = [outputs[name] for name in wanted]
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += node.all_input_nodes
    kept = {
        name: node
        for name, node in outputs.items()
        if name in wanted or (name.startswith(FLAGS) and needed.issuperset(node.all_input_nodes))
    }
    graph.output(kept)
    graph.eliminate_dead_code()
    graph.lint()
    return fx.GraphModule(nn.Module(), graph, "RefreshPart")


def converting(refresh: fx.GraphModule) -> fx.GraphModule:
    """The program of factors in other precisions and places than its first argument, the damping.

    A factor becomes like the damping where it is first used, and is let go after its last use: all
    at once would take as much memory as the averages do.
    """
    graph = copy.deepcopy(refresh.graph)
    damping, *factors = (node for node in graph.nodes if node.op == "placeholder")
    for factor in (f for f in factors if f.users):
        uses = list(factor.users)
        first = next(node for node in graph.nodes if node in factor.users)
        with graph.inserting_before(first):
            read = graph.call_method("to", (factor, damping), {"non_blocking": True})
        for use in uses:
            use.replace_input_with(factor, read)
    graph.lint()
    return fx.GraphModule(nn.Module(), graph, "ConvertingRefresh")


def emit_terms(
    curvature: CurvatureGraph,
    couplings: Collection[Coupling],
    cast: Collection[str],
    forms: Forms,
    owned: Collection[str],
) -> fx.GraphModule:
    """What some blocks contribute to the update: inverses and gradients -> terms by block.

    A block's update is the sum of the terms for it: its own, and what the pairs that it
    is an end of add to it.

    Args:
        owned: the blocks; the arguments are their inverses, and the gradients of all.
    """
    build = ProgramBuilder()
    names = inverse_names(curvature, couplings, forms)
    inverses = {
        block: [build.input(name) for name in names[block]]
        for block in curvature.blocks
        if block in owned
    }
    gradients = {name: build.input(f"gradient_{name}") for name in curvature.covered}
    made = dict(terms(build, curvature, couplings, cast, forms, inverses, gradients))
    return build.finish(made, "Terms")


def emit_sum(curvature: CurvatureGraph, cast: Collection[str]) -> fx.GraphModule:
    """The updates of all blocks, in their order, and gradients -> updates by parameter name."""
    build = ProgramBuilder()
    U = {block: build.input(f"U_{block}") for block in curvature.blocks}
    gradients = {name: build.input(f"gradient_{name}") for name in curvature.covered}
    outputs: dict[str, Any] = dict(gradients)
    for name, block in curvature.blocks.items():
        with build.section(block.slot, name):
            scatter(build, block, U[name], outputs, cast)
    return build.finish(outputs, "Sum")


def update_shapes(curvature: CurvatureGraph) -> dict[str, torch.Size]:
    """The shape of each block's update, as the one array that its inverse acts on."""
    unused = ProgramBuilder()
    return {
        name: FORMS[block.approximation]
        .gather(unused, block, [torch.empty(each.shape, device="meta") for each in block.layouts])
        .shape
        for name, block in curvature.blocks.items()
    }


def symmetric_inverses(curvature: CurvatureGraph) -> Mapping[str, bool]:
    """The inverses, by name, that are symmetric matrices."""
    return {
        f"{spec.name}_{block.slot}_inverse": True
        for block in curvature.blocks.values()
        if block.approximation in ("kronecker", "full", "pairs")
        for spec in block.factors
        if spec.role != "count" and not spec.diagonal
    }


def inverse_shapes(program: Program) -> dict[str, torch.Size]:
    """The shapes of all inverses, without computing them."""
    shapes = [
        factor.shape
        for block in program.curvature.blocks.values()
        for factor in block.factors
        if factor.role != "count"
    ]
    for coupling in program.couplings:
        sides = (
            program.curvature.blocks[name].dimensions for name in (coupling.child, coupling.parent)
        )
        shapes += [(child[0], parent[0]) for child, parent in zip(*sides, strict=True)]
    with torch.no_grad():
        factors = [torch.empty(shape, device="meta") for shape in shapes]
        found = program.refresh_module(torch.empty((), device="meta"), *factors)
    return {name: found[name].shape for name in program.inverse_names}
