"""A (x) G with factored Tikhonov damping: (A + pi gamma I) (x) (G + gamma / pi I)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kfac_fx.codegen.approximations.base import (
    BlockSpectrum,
    Damping,
    Emitted,
    FlagKey,
    InverseKey,
    Invert,
    matrices_of,
)
from kfac_fx.codegen.approximations.two_sided import TwoSided, cut_of, damp, diagonals
from kfac_fx.codegen.leaf import Value
from kfac_fx.linalg.kronecker import filled_up, kronecker_product, without_filling
from kfac_fx.linalg.positive import damped_factors
from kfac_fx.linalg.spectral import diagonalised, kept_pair, outer_diagonal

if TYPE_CHECKING:
    from kfac_fx.codegen.builder import ProgramBuilder
    from kfac_fx.ir.curvature_graph import CurvatureBlock


class Kronecker(TwoSided):
    """One Kronecker product, whose inverse is the product of the factors' inverses.

    The formulas are in docs/explanation/mathematics.md, sections 5 and 6. A side may be a diagonal
    or cut into sub-blocks, where a matrix over all its entries would be too large.
    """

    factored = True

    def inverses(self, block: CurvatureBlock) -> tuple[InverseKey, ...]:
        return tuple(InverseKey(block.slot, "inverse", spec.name) for spec in matrices_of(block))

    def refresh(
        self,
        build: ProgramBuilder,
        block: CurvatureBlock,
        factors: Sequence[Value],
        damping: Damping,
        invert: Invert,
    ) -> Emitted:
        specs = matrices_of(block)
        result = Emitted({}, {})
        pair = damp(build, block.slot, factors, specs, damping.gamma)
        for key, spec, matrix in zip(self.inverses(block), specs, pair, strict=True):
            if spec.diagonal:  # it cannot fail, so it has no flag
                result.inverses[key] = torch.reciprocal(matrix)
            else:
                inverse, failed = invert(matrix)
                result.inverses[key] = inverse
                result.flags[FlagKey(block.slot, "failed", spec.name)] = failed
        return result

    def apply(self, block: CurvatureBlock, inverses: Sequence[Value], V: Value) -> Value:
        A_inverse, G_inverse = inverses
        A, G = matrices_of(block)
        cut = cut_of(block)
        # Sub-blocks are of equal sizes, so the last one may reach past the end of V.
        V = filled_up(V, cut.missing)
        U = kronecker_product(A_inverse, G_inverse, V, diagonal=diagonals(A, G), cut=cut.parts)
        return without_filling(U, cut.missing)

    def symmetric(self, block: CurvatureBlock) -> frozenset[InverseKey]:
        pairs = zip(self.inverses(block), matrices_of(block), strict=True)
        return frozenset(key for key, spec in pairs if not spec.diagonal)

    def spectrum(
        self, block: CurvatureBlock, factors: Sequence[Tensor], damping: float
    ) -> BlockSpectrum:
        A, G = matrices_of(block)
        diagonal, cut = diagonals(A, G), (A.cut, G.cut)
        # As the program does it; only then the zeros that fill up sub-blocks are cut off.
        both = damped_factors(factors[0], factors[1], damping**0.5, diagonal=diagonal, cut=cut)
        sides = kept_pair(both, diagonal, cut)
        return BlockSpectrum(diagonalised(sides[0], sides[1]), outer_diagonal(sides), sides)
