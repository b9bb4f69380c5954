"""Parts of programs, for processes that share the work."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import torch
from torch import fx, nn

from kfac_fx.codegen.approximations.base import InverseKey, Value, matrices_of
from kfac_fx.codegen.builder import ProgramBuilder
from kfac_fx.codegen.emit import Recipe, RefreshModule, scatter, terms


def part_of_refresh(refresh: RefreshModule, wanted: Collection[InverseKey]) -> RefreshModule:
    """Return the program of some of the inverses, with the flags of all that it needs.

    Args:
        refresh: the whole; the part has the same arguments.
        wanted: keys of the inverses.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    outputs: Value = graph.graph_copy(refresh.module.graph, copies)
    needed: set[fx.Node] = set()
    todo = [outputs[key.name] for key in wanted]
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += node.all_input_nodes
    # A flag counts if all that it is computed from is computed anyway.
    flags = [f for f in refresh.flags if needed.issuperset(outputs[f.name].all_input_nodes)]
    inverses = [key for key in refresh.inverses if key in wanted]
    graph.output({key.name: outputs[key.name] for key in (*inverses, *flags)})
    graph.eliminate_dead_code()
    graph.lint()
    module = fx.GraphModule(nn.Module(), graph, "RefreshPart")
    return RefreshModule(module, tuple(inverses), tuple(flags))


def converting(refresh: fx.GraphModule) -> fx.GraphModule:
    """Return the program of factors in other precisions and places than the damping, its first.

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


def emit_terms(recipe: Recipe, owned: Collection[str]) -> fx.GraphModule:
    """Emit what some blocks contribute to the update: inverses and gradients -> terms by block.

    A block's update is the sum of the terms for it: its own, and what the pairs that it
    is an end of add to it.

    Args:
        recipe: of all blocks, not batched.
        owned: the blocks; the arguments are their inverses, and the gradients of all.
    """
    build = ProgramBuilder()
    inverses = {
        block: [build.input(key.name) for key in keys]
        for block, keys in recipe.inverses().items()
        if block in owned
    }
    gradients = {name: build.input(f"gradient_{name}") for name in recipe.curvature.covered}
    made = dict(terms(build, recipe, inverses, gradients))
    return build.finish(made, "Terms")


def emit_sum(recipe: Recipe) -> fx.GraphModule:
    """Emit the sum: updates of all blocks, in their order, and gradients -> updates by name."""
    build = ProgramBuilder()
    blocks = recipe.curvature.blocks
    U = {block: build.input(f"U_{block}") for block in blocks}
    gradients = {name: build.input(f"gradient_{name}") for name in recipe.curvature.covered}
    outputs: dict[str, Value] = dict(gradients)
    for name, block in blocks.items():
        with build.section(block.slot, name):
            scatter(build, recipe, block, U[name], outputs)
    return build.finish(outputs, "Sum")


def update_shapes(recipe: Recipe) -> dict[str, torch.Size]:
    """Return the shape of each block's update, as the one array that its inverse acts on."""
    return {
        name: recipe.of(block)
        .gather(block, [torch.empty(each.shape, device="meta") for each in block.layouts])
        .shape
        for name, block in recipe.curvature.blocks.items()
    }


def symmetric_inverses(recipe: Recipe) -> frozenset[InverseKey]:
    """Return the inverses that are symmetric matrices."""
    blocks = recipe.curvature.blocks.values()
    return frozenset(key for block in blocks for key in recipe.of(block).symmetric(block))


def inverse_shapes(recipe: Recipe, refresh: RefreshModule) -> dict[InverseKey, torch.Size]:
    """Return the shapes of all inverses, by running the refresh on tensors without values."""
    blocks = recipe.curvature.blocks
    shapes: list[Sequence[int]] = [
        spec.shape for block in blocks.values() for spec in matrices_of(block)
    ]
    for coupling in recipe.couplings:
        child, parent = blocks[coupling.child].dimensions, blocks[coupling.parent].dimensions
        shapes += [(one[0], other[0]) for one, other in zip(child, parent, strict=True)]
    with torch.no_grad():
        factors = [torch.empty(shape, device="meta") for shape in shapes]
        found = refresh.module(torch.empty((), device="meta"), *factors)
    return {key: found[key.name].shape for key in refresh.inverses}
