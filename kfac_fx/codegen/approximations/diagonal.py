"""Diagonals of a block's covariance, entry by entry: C + lambda."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kfac_fx.codegen.approximations.base import (
    BlockApproximation,
    BlockSpectrum,
    Damping,
    Emitted,
    InverseKey,
    Invert,
)
from kfac_fx.codegen.leaf import Value
from kfac_fx.linalg.spectral import SideMatrix, diagonalised

if TYPE_CHECKING:
    from kfac_fx.codegen.builder import ProgramBuilder
    from kfac_fx.ir.curvature_graph import CurvatureBlock


class Diagonal(BlockApproximation):
    """The second moments C [d] of a block's gradients, one after another as a vector.

    What is left where nothing else is known, or where a full covariance is too large.
    """

    def inverses(self, block: CurvatureBlock) -> tuple[InverseKey, ...]:
        return (InverseKey(block.slot, "inverse", "C"),)

    def refresh(
        self,
        build: ProgramBuilder,
        block: CurvatureBlock,
        factors: Sequence[Value],
        damping: Damping,
        invert: Invert,
    ) -> Emitted:
        (key,) = self.inverses(block)
        # It cannot fail, so there is no flag: second moments are not negative, lambda is positive.
        return Emitted({key: torch.reciprocal(factors[0] + damping.lam)}, {})

    def apply(self, block: CurvatureBlock, inverses: Sequence[Value], V: Value) -> Value:
        return inverses[0] * V

    def spectrum(
        self, block: CurvatureBlock, factors: Sequence[Tensor], damping: float
    ) -> BlockSpectrum:
        # As a Kronecker block whose side of inputs is the number one.
        one = SideMatrix((factors[0].new_ones(1),), diagonal=True)
        C = SideMatrix((factors[0],), diagonal=True)
        return BlockSpectrum(diagonalised(one, C, damping), C.entries().unsqueeze(-1) + damping)
