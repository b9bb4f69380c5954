"""Parts of the apply, for processes that share the work."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from kfac_fx.codegen.approximations.base import InverseKey
from kfac_fx.codegen.builder import ProgramBuilder
from kfac_fx.codegen.emit import Recipe, scatter, terms
from kfac_fx.codegen.leaf import Value


def emit_terms(recipe: Recipe, owned: Collection[str]) -> fx.GraphModule:
    """Emit what some blocks contribute to the update: inverses and gradients -> terms by block.

    A block's update is the sum of the terms for it: its own, and what the pairs that it
    is an end of add to it.

    Args:
        recipe: the recipe of all blocks, not batched.
        owned: the blocks; the arguments are their inverses, and the gradients of all.
    """
    build = ProgramBuilder()
    inverses = {
        block: [build.input(key.name) for key in keys]
        for block, keys in recipe.inverses().items()
        if block in owned
    }
    gradients = {name: build.input(f"gradient_{name}") for name in recipe.curvature.covered}
    # Terms are not scattered here: those of one block come from several processes, and are added
    # in one order everywhere before the sum becomes an update.
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
    # On the meta device, so the answer is the approximation's own and costs no memory.
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
