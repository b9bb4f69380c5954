"""What can be read off an inverse Fisher, the same for everything that holds one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from kfac_fx.codegen.program import Program
from kfac_fx.curvature.inverses import InverseFisher
from kfac_fx.ir import Coupling
from kfac_fx.reading.operator import CurvatureOperator
from kfac_fx.reading.report import CurvatureReport, report_of


class HasCurvature:
    """Statistics, the program, reports and the operator of ``_inverse``."""

    _inverse: InverseFisher

    def _in_force(self) -> float:
        """The damping lambda; factored Tikhonov uses gamma = sqrt(lambda)."""
        raise NotImplementedError

    @property
    def factors(self) -> Mapping[str, tuple[Tensor, ...]]:
        """Block name -> running averages, undamped.

        Their scale is that of docs/explanation/mathematics.md, section 2.

        As they are now: what was read before a step must be read again behind it.

        Kronecker blocks have (A, G), the homogeneous coordinate last and the groups of a grouped
        convolution first; a side that ``large_factors="blocks"`` cuts is [k, b, b], zeros behind
        its end. Other blocks have (C,), the covariance of per-case gradients.
        """
        return MappingProxyType(self._inverse.factors)

    @property
    def cross_factors(self) -> Mapping[tuple[str, str], tuple[Tensor, Tensor]]:
        """(child, parent) -> running averages (A, G), child by parent, in the factors' scale."""
        return MappingProxyType(self._inverse.cross_factors)

    @property
    def couplings(self) -> tuple[Coupling, ...]:
        """The forest in use; the transform's own until the data choose another."""
        return self._inverse.program.couplings

    def mutual_information(self, couplings: Iterable[Coupling] | None = None) -> float:
        """Of a forest's pairs, in nats: how much closer to Ftilde it is than block-diagonal.

        Args:
            couplings: among the recorded pairs; None for those in use.

        Raises:
            StatisticsError: a pair is not recorded.
        """
        given = self.couplings if couplings is None else couplings
        return self._inverse.mutual_information(given, self._in_force())

    @property
    def program(self) -> Program:
        """The generated program."""
        return self._inverse.program

    def curvature_operator(self, dtype: torch.dtype = torch.float64) -> CurvatureOperator:
        """Fhat of the present factors and damping, as a linear operator; see there for errors."""
        return CurvatureOperator(self._inverse, self._in_force(), dtype)

    @property
    def clamped(self) -> int:
        """Entries of conditionals that rounding had pushed to one, over all refreshes."""
        return self._inverse.clamped

    def report(self) -> CurvatureReport:
        """Spectra of the factors, the damping in force, strength of couplings; for ``print``."""
        return report_of(self._inverse, self._in_force() ** 0.5)
