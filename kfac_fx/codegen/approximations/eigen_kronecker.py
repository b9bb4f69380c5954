"""A (x) G + lambda I in the eigenbases of A and G: exact Tikhonov damping, and EKFAC's bases."""

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
from kfac_fx.codegen.approximations.two_sided import TwoSided, cut_of, diagonals
from kfac_fx.codegen.leaf import Value, leaf
from kfac_fx.linalg import kronecker
from kfac_fx.linalg.kronecker import filled_up, without_filling
from kfac_fx.linalg.spectral import diagonalised, kept_pair, outer_diagonal

if TYPE_CHECKING:
    from kfac_fx.codegen.builder import ProgramBuilder
    from kfac_fx.ir.curvature_graph import CurvatureBlock

eigenbasis = leaf(kronecker.eigenbasis)
damped_scale = leaf(kronecker.damped_scale)
eigen_product = leaf(kronecker.eigen_product)


class EigenKronecker(TwoSided):
    """One Kronecker product, damped as a whole: divide by s_G s_A^T + lambda in the bases.

    The basis of a diagonal side is the identity, and left out. With ``tikhonov="ekfac"`` the scale
    is replaced by one over second moments in the same bases (docs/explanation/mathematics.md,
    section 5), which ``kfac_fx.curvature.ekfac`` averages.
    """

    cube_cost = EIGEN_COST
    estimable = True

    def inverses(self, block: CurvatureBlock) -> tuple[InverseKey, ...]:
        bases = [
            InverseKey(block.slot, "basis", spec.name)
            for spec in matrices_of(block)
            if not spec.diagonal
        ]
        return (*bases, InverseKey(block.slot, "scale"))

    def refresh(
        self,
        build: ProgramBuilder,
        block: CurvatureBlock,
        factors: Sequence[Value],
        damping: Damping,
        invert: Invert,
    ) -> Emitted:
        spectra: list[Value] = []
        result = Emitted({}, {})
        for spec, factor in zip(matrices_of(block), factors, strict=True):
            if spec.diagonal:  # its entries are its eigenvalues
                spectra.append(factor)
                continue
            values, basis = eigenbasis(factor)
            values = build.name(values, f"s_{spec.name}_{block.slot}")
            # Sub-blocks of one side: their eigenvalues lie one after another along V.
            spectra.append(values.flatten() if spec.cut else values)
            result.inverses[InverseKey(block.slot, "basis", spec.name)] = basis
        s_A, s_G = spectra
        # No flag: eigenvalues are at least zero, and eigh raises where it fails.
        result.inverses[InverseKey(block.slot, "scale")] = damped_scale(s_A, s_G, damping.lam)
        return result

    def apply(self, block: CurvatureBlock, inverses: Sequence[Value], V: Value) -> Value:
        found = dict(zip(self.inverses(block), inverses, strict=True))
        U_A = found.get(InverseKey(block.slot, "basis", "A"))
        U_G = found.get(InverseKey(block.slot, "basis", "G"))
        cut = cut_of(block)
        V = filled_up(V, cut.missing)
        # A program reads better without an option that says nothing.
        options = {"cut": cut.parts} if any(cut.parts) else {}
        U = eigen_product(U_A, U_G, found[InverseKey(block.slot, "scale")], V, **options)
        return without_filling(U, cut.missing)

    def spectrum(
        self, block: CurvatureBlock, factors: Sequence[Tensor], damping: float
    ) -> BlockSpectrum:
        A, G = matrices_of(block)
        sides = kept_pair((factors[0], factors[1]), diagonals(A, G), (A.cut, G.cut))
        return BlockSpectrum(
            diagonalised(sides[0], sides[1], damping), outer_diagonal(sides) + damping
        )

    def damping(
        self, block: CurvatureBlock, factors: Sequence[Tensor], gamma: float
    ) -> DampingReport:
        none = torch.zeros((), dtype=torch.float64)
        return DampingReport((none, none), product=gamma**2)

    def condition(self, values: Sequence[Tensor], damping: DampingReport) -> Tensor | None:
        a, g = values
        assert damping.product is not None
        largest = a.amax(-1) * g.amax(-1) + damping.product
        return largest / (a.amin(-1) * g.amin(-1) + damping.product)
