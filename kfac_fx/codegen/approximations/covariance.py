"""Full covariances of a block's gradients, of all entries or entry by entry: C + lambda I."""

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
    FlagKey,
    InverseKey,
    Invert,
)
from kfac_fx.codegen.leaf import Value, leaf
from kfac_fx.linalg import positive
from kfac_fx.linalg.spectral import SideMatrix, diagonalised

if TYPE_CHECKING:
    from kfac_fx.codegen.builder import ProgramBuilder
    from kfac_fx.ir.curvature_graph import CurvatureBlock

damped = leaf(positive.damped)


class Covariance(BlockApproximation):
    """The full covariance C [d, d] of a block's gradients, one after another as a vector.

    For what has few parameters: scale and shift of a normalisation, a bias by itself.
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
        inverse, failed = invert(damped(factors[0], damping.lam))
        (key,) = self.inverses(block)
        return Emitted({key: inverse}, {FlagKey(block.slot, "failed", "C"): failed})

    def apply(self, block: CurvatureBlock, inverses: Sequence[Value], V: Value) -> Value:
        # A column, so that stacks of vectors and of inverses are multiplied pair by pair.
        return (inverses[0] @ V.unsqueeze(-1)).squeeze(-1)

    def symmetric(self, block: CurvatureBlock) -> frozenset[InverseKey]:
        return frozenset(self.inverses(block))

    def spectrum(
        self, block: CurvatureBlock, factors: Sequence[Tensor], damping: float
    ) -> BlockSpectrum:
        # As a Kronecker block whose side of inputs is the number one.
        one, C = SideMatrix((factors[0].new_ones(1),), diagonal=True), SideMatrix((factors[0],))
        return BlockSpectrum(diagonalised(one, C, damping), C.entries().unsqueeze(-1) + damping)


class PairedCovariances(Covariance):
    """One covariance [K, K] of K parameters for each of d entries: C [d, K, K].

    For scale and shift of a normalisation with more channels than a full covariance may have.
    """

    def gather(self, block: CurvatureBlock, gradients: Sequence[Value]) -> Value:
        return torch.stack([gradient.reshape(-1) for gradient in gradients], -1)

    def scatter(self, block: CurvatureBlock, U: Value) -> Sequence[Value]:
        return [U[..., index].reshape(layout.shape) for index, layout in enumerate(block.layouts)]
