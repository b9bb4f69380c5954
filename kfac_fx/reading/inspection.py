"""Read an inverse Fisher, in the same way for ``Preconditioner`` and ``KFAC``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from kfac_fx.codegen.program import Program
from kfac_fx.curvature.inverses import InverseFisher
from kfac_fx.ir.coupling import Coupling
from kfac_fx.reading.operator import CurvatureOperator
from kfac_fx.reading.report import CurvatureReport, report_of


class HasCurvature:
    """Reads statistics, the program, reports and the operator off ``inverse``.

    Both optimizers are read alike, whatever their step is. Nothing here changes them.
    """

    # For the rooms of the library: averages, program and inverses. Users have the properties below.
    inverse: InverseFisher

    def _in_force(self) -> float:
        """Return the damping lambda; factored Tikhonov uses gamma = sqrt(lambda)."""
        raise NotImplementedError

    @property
    def factors(self) -> Mapping[str, tuple[Tensor, ...]]:
        """Return the running averages by block, undamped.

        Their scale is that of docs/explanation/mathematics.md, section 2. They are the averages
        themselves: later steps change them, so read them again after a step. With
        ``factor_storage`` they are copies, in the precision and on the device of the inverses.

        Kronecker blocks have (A, G), the homogeneous coordinate last and the groups of a grouped
        convolution first; a side that ``large_factors="blocks"`` cuts is [k, b, b], zeros after
        its end. Other blocks have (C,), the covariance of per-case gradients.
        """
        return MappingProxyType(self.inverse.factors)

    @property
    def cross_factors(self) -> Mapping[tuple[str, str], tuple[Tensor, Tensor]]:
        """Return the running averages (A, G) of couplings by (child, parent), child by parent.

        Their scale is that of ``factors``. Without couplings there are none.
        """
        return MappingProxyType(self.inverse.cross_factors)

    @property
    def couplings(self) -> tuple[Coupling, ...]:
        """Return the forest in use; the transform's own until the data choose another."""
        return self.inverse.program.couplings

    def mutual_information(self, couplings: Iterable[Coupling] | None = None) -> float:
        """Return how much closer to Ftilde a forest is than block-diagonal, in nats.

        That is the mutual information of its pairs, under the damping in force.

        Args:
            couplings: among the recorded pairs; None for those in use.

        Raises:
            StatisticsError: a pair is not recorded.
        """
        given = self.couplings if couplings is None else tuple(couplings)
        return self.inverse.mutual_information(given, self._in_force())

    @property
    def program(self) -> Program:
        """Return the generated program; ``program.code`` is its text."""
        return self.inverse.program

    def curvature_operator(self, dtype: torch.dtype = torch.float64) -> CurvatureOperator:
        """Return Fhat of the present factors and damping, as a linear operator.

        Args:
            dtype: precision of the operator; its vectors are converted.

        Raises:
            StatisticsError, OperatorError: see ``CurvatureOperator``.
        """
        return CurvatureOperator(self.inverse, self._in_force(), dtype)

    @property
    def clamped(self) -> int:
        """Return how many entries of conditionals rounding had pushed to one, over all refreshes.

        A few are harmless. Many say that neighbouring layers are almost dependent: the damping is
        too small for the precision.
        """
        return self.inverse.clamped

    def report(self) -> CurvatureReport:
        """Return spectra of the factors, the damping in force and strengths of couplings.

        Eigenvalues of all factors are computed, which costs more than a refresh. ``print`` shows
        the report as a table.
        """
        return report_of(self.inverse, self._in_force() ** 0.5)
