"""A (x) G + A_2 (x) G_2 for a weight that is used in two ways, the second product damped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kfac_fx.codegen.approximations.base import (
    EIGEN_COST,
    BlockSpectrum,
    Damping,
    DampingReport,
    Emitted,
    InverseKey,
    Invert,
    matrices_of,
)
from kfac_fx.codegen.approximations.two_sided import (
    TwoSided,
    cut_of,
    damp,
    diagonals,
    on_sides,
)
from kfac_fx.codegen.leaf import Value, leaf
from kfac_fx.linalg import kronecker
from kfac_fx.linalg.kronecker import filled_up, without_filling
from kfac_fx.linalg.positive import damped_factors
from kfac_fx.linalg.spectral import kept_pair, outer_diagonal, summed

if TYPE_CHECKING:
    from kfac_fx.codegen.builder import ProgramBuilder
    from kfac_fx.ir.curvature_graph import CurvatureBlock
    from kfac_fx.ir.use import FactorSpec

common_basis = leaf(kronecker.common_basis)
sum_inverse_product = leaf(kronecker.sum_inverse_product)


class KroneckerSum(TwoSided):
    """Two Kronecker products, inverted exactly in the common bases of both sides.

    The damping is factored also where others are damped exactly: two products and the identity
    have no common bases. Sides that are diagonal in both products stay vectors.
    """

    cube_cost = EIGEN_COST
    alone = True  # stacks of common bases were never measured to pay, and such blocks are rare
    factored = True

    def inverses(self, block: CurvatureBlock) -> tuple[InverseKey, ...]:
        slot = block.slot
        return (
            InverseKey(slot, "basis", "A"),
            InverseKey(slot, "scale", "A"),
            InverseKey(slot, "basis", "G"),
            InverseKey(slot, "scale", "G"),
        )

    def refresh(
        self,
        build: ProgramBuilder,
        block: CurvatureBlock,
        factors: Sequence[Value],
        damping: Damping,
        invert: Invert,
    ) -> Emitted:
        specs = matrices_of(block)
        # Damping one product makes the sum positive; both would be damped twice as much as others.
        second = damp(build, block.slot, factors[2:], specs[2:], damping.gamma)
        result = Emitted({}, {})
        sides = zip(on_sides(block), factors[:2], second, strict=True)
        for here, plain, other in sides:
            # Of two diagonals no eigenvectors are needed: they are diagonal in the same basis.
            if all(spec.diagonal for spec in here):
                basis, scale = torch.rsqrt(other), plain / other
            else:
                plain, other = _as_matrices(plain, other, here)
                basis, scale = common_basis(other, plain)
                scale = scale.flatten() if any(spec.cut for spec in here) else scale
            side = here[0].side
            result.inverses[InverseKey(block.slot, "basis", side)] = basis
            result.inverses[InverseKey(block.slot, "scale", side)] = scale
        return result

    def apply(self, block: CurvatureBlock, inverses: Sequence[Value], V: Value) -> Value:
        K_A, s_A, K_G, s_G = inverses
        on_A, on_G = on_sides(block)
        both = all(spec.diagonal for spec in on_A), all(spec.diagonal for spec in on_G)
        cut = cut_of(block)
        V = filled_up(V, cut.missing)
        U = sum_inverse_product(K_A, K_G, s_A, s_G, V, diagonal=both, cut=cut.parts)
        return without_filling(U, cut.missing)

    def spectrum(
        self, block: CurvatureBlock, factors: Sequence[Tensor], damping: float
    ) -> BlockSpectrum:
        A, G, A_2, G_2 = matrices_of(block)
        first = kept_pair((factors[0], factors[1]), diagonals(A, G), (A.cut, G.cut))
        diagonal, cut = diagonals(A_2, G_2), (A_2.cut, G_2.cut)
        both = damped_factors(factors[2], factors[3], damping**0.5, diagonal=diagonal, cut=cut)
        second = kept_pair(both, diagonal, cut)
        return BlockSpectrum(summed(first, second), outer_diagonal(first) + outer_diagonal(second))

    def condition(self, values: Sequence[Tensor], damping: DampingReport) -> Tensor | None:
        return None  # eigenvalues of a sum do not follow from those of its terms


def _as_matrices(plain: Value, other: Value, specs: Sequence[FactorSpec]) -> tuple[Value, Value]:
    """Return both factors of a side as matrices, or as sub-blocks where one of them is cut."""
    cut_spec = next((spec for spec in specs if spec.cut), None)
    result = []
    for factor, spec in zip((plain, other), specs, strict=True):
        if spec.diagonal and cut_spec is not None:
            parts, size = cut_spec.shape[:2]
            missing = parts * size - cut_spec.cut
            factor = torch.nn.functional.pad(factor, (0, missing)).unflatten(-1, (parts, -1))
        result.append(torch.diag_embed(factor) if spec.diagonal else factor)
    return result[0], result[1]
