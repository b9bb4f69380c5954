"""A block's entries of a mapping by parameter name, as the one array that its form acts on."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kfac_fx.codegen.builder import ProgramBuilder
from kfac_fx.codegen.forms import FORMS
from kfac_fx.ir import CurvatureBlock

_UNUSED = ProgramBuilder()  # forms gather and scatter tensors as they do a program's values


def gathered(block: CurvatureBlock, given: Mapping[str, Tensor]) -> Tensor:
    """[..., g, a] of a Kronecker block, [..., d] of others."""
    pairs = zip(block.parameters, block.layouts, strict=True)
    parts = [layout.apply(given[name]) for name, layout in pairs]
    V: Tensor = FORMS[block.approximation].gather(_UNUSED, block, parts)
    return V


def scattered(block: CurvatureBlock, U: Tensor, into: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of ``into`` that the block covers, with its entries replaced."""
    result: dict[str, Tensor] = {}
    parts = FORMS[block.approximation].scatter(_UNUSED, block, U)
    for name, part, layout in zip(block.parameters, parts, block.layouts, strict=True):
        result[name] = layout.embed(part, result.get(name, into[name]))
    return result
