"""The Fisher of a data set, without training: its factors, and operators with any damping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from kfac_fx.codegen.approximations.base import BlockSpectrum
from kfac_fx.codegen.approximations.table import TABLES
from kfac_fx.curvature.ekfac import Eigenbasis
from kfac_fx.curvature.inverses import InverseFisher
from kfac_fx.errors import DampingError, OperatorError
from kfac_fx.ir.curvature_graph import CurvatureBlock, CurvatureGraph
from kfac_fx.linalg.spectral import Spectral
from kfac_fx.reading.operator import CurvatureOperator


@dataclass(frozen=True)
class _Eigen:
    """The undamped eigenvalues of a block, in orthonormal coordinates.

    Attributes:
        spectral: the block.
        diagonal: its diagonal, in the shape of the block's array.
    """

    spectral: Spectral
    diagonal: Tensor

    def damped(self, damping: float) -> BlockSpectrum:
        """Return the block with ``damping`` times the identity added."""
        made = self.spectral
        moved = Spectral(made.d + damping, made.J, made.K)
        return BlockSpectrum(moved, self.diagonal + damping)


class FisherEstimate:
    """What ``kfac_fx.estimate`` returns: means over a data set, and linear algebra with them.

    Every block is decomposed once, when the first operator is asked for; operators with other
    dampings and scales share that.

    Args:
        inverse: has the averages.
        terms: the number of likelihood terms that they are means over.
        bases: EKFAC's bases and eigenvalues by block; none without ``ekfac``.

    Attributes:
        curvature: the blocks and couplings of the network.
        terms: the number of likelihood terms (their weights count) of the data set. All factors
            are means over them; ``operator(scale="sum")`` is of the sum.
    """

    def __init__(
        self, inverse: InverseFisher, terms: float, bases: Mapping[str, Eigenbasis]
    ) -> None:
        self.curvature: CurvatureGraph = inverse.curvature
        self.terms = terms
        self._inverse = inverse
        self._bases = dict(bases)
        self._eigen: dict[torch.dtype, dict[str, _Eigen]] = {}

    @property
    def factors(self) -> Mapping[str, tuple[Tensor, ...]]:
        """Return the factors by block, means over terms; see ``Preconditioner.factors``."""
        return MappingProxyType(self._inverse.factors)

    @property
    def cross_factors(self) -> Mapping[tuple[str, str], tuple[Tensor, Tensor]]:
        """Return the factors (A, G) of couplings by (child, parent), child by parent."""
        return MappingProxyType(self._inverse.cross_factors)

    @property
    def eigenvalues(self) -> Mapping[str, Tensor]:
        """Return the undamped eigenvalues of every block, mean over terms, without couplings.

        Those of Kronecker blocks are [g, a]: with ``ekfac`` second moments of per-case gradients in
        the bases, else products of the eigenvalues of A and G. Those of others are flat.

        Raises:
            OperatorError: a block is a sum of two products.
        """
        found = {name: one.spectral.d for name, one in self._decomposed(torch.float64).items()}
        return MappingProxyType(found)

    def operator(
        self,
        damping: float | Mapping[str, float] = 0.0,
        *,
        scale: str = "mean",
        couplings: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> CurvatureOperator:
        """Return the Fisher plus damping times the identity, as a linear operator.

        No eigenvalue is computed again: another damping is another sum. An undamped operator may be
        singular: its products, norm, trace and eigenvalues are those of the Fisher, and ``solve``
        magnifies what is rounding.

        With couplings the exact sum with lambda I has no Kronecker form, as (F_pp + lambda I)^-1
        has none. There damping is factored. To each diagonal block that adds at least lambda I:
        Fhat is that of more damping than lambda, by the cross terms of section 5 of
        docs/explanation/mathematics.md.

        Args:
            damping: lambda, or one for each block by name (blocks that are not named have none); of
                a posterior the precision of the prior.
            scale: "mean", of the mean negative log-likelihood of a term, or "sum", of the sum.
            couplings: whether the block-tridiagonal form is meant; it needs
                structure="block_tridiagonal" and one damping above zero.
            dtype: the precision of the operator.

        Raises:
            DampingError: a damping is negative or not finite.
            OperatorError: a block has no name like that, there are no couplings, or a block has no
                operator.
        """
        amounts = self._amounts(damping)
        if scale not in ("mean", "sum"):
            raise OperatorError(f"scale={scale!r} is unknown; valid are 'mean', 'sum'")
        factor = self.terms if scale == "sum" else 1.0
        if couplings:
            if isinstance(damping, Mapping) or damping <= 0 or not self.cross_factors:
                raise OperatorError(
                    "couplings=True needs cross factors (structure='block_tridiagonal') and one "
                    "damping above zero: with couplings damping is factored"
                )
            return CurvatureOperator(self._inverse, damping, dtype, scale=factor)
        blocks = {
            name: one.damped(amounts[name] / factor)
            for name, one in self._decomposed(dtype).items()
        }
        return CurvatureOperator(self._inverse, 0.0, dtype, scale=factor, blocks=blocks)

    def _amounts(self, damping: float | Mapping[str, float]) -> dict[str, float]:
        """Return the damping of each block."""
        if not isinstance(damping, Mapping):
            damping = dict.fromkeys(self.curvature.blocks, damping)
        unknown = [name for name in damping if name not in self.curvature.blocks]
        if unknown:
            raise OperatorError(f"there is no block {unknown[0]!r}")
        for value in damping.values():
            if not (math.isfinite(value) and value >= 0):
                raise DampingError(f"damping must be finite and at least zero, got {value!r}")
        return {name: float(damping.get(name, 0.0)) for name in self.curvature.blocks}

    def _decomposed(self, dtype: torch.dtype) -> dict[str, _Eigen]:
        """Return the undamped eigenvalues of all blocks, computed once."""
        if dtype not in self._eigen:
            factors = self._inverse.factors
            self._eigen[dtype] = {
                name: self._decompose(block, [f.to(dtype) for f in factors[name]], dtype)
                for name, block in self.curvature.blocks.items()
            }
        return self._eigen[dtype]

    def _decompose(
        self, block: CurvatureBlock, factors: list[Tensor], dtype: torch.dtype
    ) -> _Eigen:
        if block.name in self._bases:
            found = self._bases[block.name].spectrum(0.0, dtype)
            return _Eigen(found.spectral, found.diagonal)
        if block.approximation == "kronecker_sum":
            raise OperatorError(
                f"block {block.name} is a sum of two Kronecker products, whose eigenvalues do not "
                "follow from those of its factors: leave it out with transform(..., exclude=...)"
            )
        found = TABLES["exact"][block.approximation].spectrum(block, factors, 0.0)
        return _Eigen(found.spectral, found.diagonal)
