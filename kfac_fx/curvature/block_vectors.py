"""A block's entries of a mapping by parameter name, as the one array that its inverse acts on."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kfac_fx.codegen.approximations.table import SHAPES
from kfac_fx.ir.curvature_graph import CurvatureBlock


def gathered(block: CurvatureBlock, given: Mapping[str, Tensor]) -> Tensor:
    """Return the block's array: [..., g, a] of a Kronecker block, [..., d] of others.

    Args:
        block: the block.
        given: a tensor for each parameter that it covers, in the parameter's shape.
    """
    # The same code that programs are emitted with, called on tensors: both cannot differ.
    pairs = zip(block.parameters, block.layouts, strict=True)
    parts = [layout.apply(given[name]) for name, layout in pairs]
    V: Tensor = SHAPES[block.approximation].gather(block, parts)
    return V


def scattered(block: CurvatureBlock, U: Tensor, into: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of ``into`` that the block covers, with its entries replaced by those of U."""
    result: dict[str, Tensor] = {}
    parts = SHAPES[block.approximation].scatter(block, U)
    for name, part, layout in zip(block.parameters, parts, block.layouts, strict=True):
        # Blocks of pieces of one parameter replace their own entries of it, one after another.
        result[name] = layout.embed(part, result.get(name, into[name]))
    return result
